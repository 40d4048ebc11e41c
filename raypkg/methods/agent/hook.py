"""AGENT as a hook: steps' gradients are corrected by those of a snapshot of the model, where that pays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.engine.hooks import Hook, Results, hook
from raypkg.engine.run import Run
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job

from . import plots
from .control_variate import correct, spread, variance_left
from .forms import form_of
from .settings import AgentOptions
from .snapshot import CORRECTION, FULL_GRADIENT, Snapshot, trained_parameters
from .switch import Switch, looked_at

COLUMNS = ("step", "corrected", "c", "left", "line")  # left: share of the variance, NaN where it is not known
DEFAULTS = AgentOptions()


class Gradients(NamedTuple):
    """A step's gradients of the model and of its snapshot, over all workers, before the correction."""

    step: int
    current: list[Tensor]
    snapshot: list[Tensor]


class Correction(Hook):
    """Corrects gradients by a control variate with an adaptive weight (AGENT, arXiv:2301.03573).

        at a snapshot:  θ̃ ← θ,  g̃ = mean of ∇ℓ(θ̃) over the samples of an epoch
        every step:     ∇ℓ_B(θ) − γc·(∇ℓ_B(θ̃) − g̃)

    It comes after the hooks that use the raw gradient (RigL grows on it) and before `Masked`. Momentum sees the
    corrected gradient; weight decay is the optimiser's and is not corrected.

    Differs from the paper: c is measured from the gradients of the latest steps, for each layer, and γ = 1; where more
    variance is left than batches of the same cost would have, nothing is corrected until that changes. With the form
    "published", ĉ is taken from the batch losses of the steps since the last snapshot, which are there anyway, while θ
    moves; from their differences from step to step, in which that drift cancels; and every step is corrected. g̃ is over
    the very batches, augmented, that the coming epoch consists of, unless another hook supplies those. Where the model
    draws at random, as dropout does, the snapshot draws on each batch what the model drew there, m:

        every step:     ∇ℓ_B(θ; m) − γc·(∇ℓ_B(θ̃; m) − g̃)

    and g̃ is taken with draws of its own: an unbiased estimate of the snapshot's mean gradient over all draws.

    Args:
        settings: the form of c, γ, α, and how often.
    """

    priority = 10

    def __init__(self, settings: AgentOptions):
        self.settings = settings
        self.form = form_of(settings)
        self.switch = Switch(settings.stays_on, settings.look_every_epochs)
        self.snapshot: Snapshot | None = None  # made at the start
        self.line = 0.0  # 1/q
        self.left: float | None = None  # of the variance, at the latest judgement
        self.variance = torch.zeros(2, dtype=torch.float64)  # after and before the correction, summed
        self.before: Gradients | None = None  # of the latest step that was looked at
        self.unread: list[tuple[int, bool, Tensor]] = []  # c and what is left, of the latest steps, [2]
        self.history: list[tuple[float, ...]] = []  # ``COLUMNS`` of every step that was corrected or looked at

    @property
    def c(self) -> float:
        """The weight over all layers, without γ."""
        return float(self.form.c)

    def on_start(self, run: Run) -> None:
        """Make room for the snapshot."""
        self.snapshot = Snapshot(run, self.settings)
        self.variance = self.variance.to(run.worker.device)

    def on_epoch(self, run: Run) -> None:
        """Begin at a new snapshot, unless snapshots are taken by steps."""
        self.before = None
        if run.step == 0 or not self.settings.snapshot_every_steps:
            with run.bill(FULL_GRADIENT):
                self._begin(run)

    def on_gradients(self, run: Run) -> None:
        """Correct the gradients of this step, or look at them, after a new snapshot where it is due."""
        interval = self.settings.snapshot_every_steps
        if interval and run.step and run.step % interval == 0:
            with run.cost.apart(run.bill(FULL_GRADIENT)):
                self._begin(run)
        if self._acts_at(run):
            with run.cost.apart(run.bill(CORRECTION)):
                self._act(run)

    def on_epoch_end(self, run: Run) -> None:
        """Sum what the workers took in, for a checkpoint is the first worker's, and note what was measured."""
        self.form.join(run.worker.sum)
        self._read()

    def close(self) -> None:
        """Stop watching the model."""
        if self.snapshot:
            self.snapshot.close()

    def results(self, run: Run) -> Results:
        """Return what was measured at every step that was corrected or looked at, with its picture."""
        columns = np.array(self.history).reshape(-1, len(COLUMNS)).T
        table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
        corrected = int(table["corrected"].to_numpy().sum())
        latest = self._left(*self.variance.tolist())
        left = self.left if latest is None else latest
        return Results(
            facts={"corrected_steps": corrected, "variance_left": left, "variance_line": self.line},
            findings=[_finding(corrected, run.step, left, self.line)],
            tables={"correction": table},
            plots={"correction": partial(plots.correction, table.to_pylist())},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the weight, what was decided, and what outlives an epoch where snapshots are taken by steps."""
        state = {
            "form": self.form.state_dict(),
            "switch": self.switch.state_dict(),
            "line": self.line,
            "left": self.left,
            "variance": self.variance.clone(),
            "history": torch.tensor(self.history, dtype=torch.float64).view(-1, len(COLUMNS)),
        }
        if self.settings.snapshot_every_steps:
            state["snapshot"] = self._snapshot.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        device = self.variance.device
        self.form.load_state_dict(state["form"], device)
        self.switch.load_state_dict(state["switch"])
        self.line = state["line"]
        self.left = state["left"]
        self.variance = state["variance"].to(device)
        self.history = [tuple(row) for row in state["history"].tolist()]
        if self.settings.snapshot_every_steps:
            self._snapshot.load_state_dict(state["snapshot"], device)

    @property
    def _snapshot(self) -> Snapshot:
        assert self.snapshot is not None  # made before the first epoch
        return self.snapshot

    def _begin(self, run: Run) -> None:
        """Judge what was left since the last snapshot, take a new one, and average its gradients where needed."""
        rate = run.optimizer.param_groups[0]["lr"]
        self._judge(run, rate)
        self.switch.begin(rate=rate, epoch=run.epoch)
        self.form.join(run.worker.sum)
        self.form.restart(run.epoch / run.settings.epochs)
        # Another processor may have rounded otherwise.
        self.form.load_state_dict(run.worker.first(self.form.state_dict()), run.worker.device)
        self.line = 1 / self._snapshot.gradients_a_step(run)
        self.before = None
        self._snapshot.take(run)
        if self.switch.on and self.form.acts:
            self._snapshot.average(run)

    def _judge(self, run: Run, rate: float) -> None:
        """Switch by the share of variance that was left, over all steps, since the last snapshot."""
        left = self._left(*run.worker.first(self.variance.tolist()))
        self.variance.zero_()
        if left is not None:
            self.left = left
            self.switch.judge(left, self.line, rate=rate, epoch=run.epoch)

    def _left(self, after: float, before: float) -> float | None:
        """Return what is left of the variance over all steps, some of them corrected; None where it is not known."""
        if not before > 0:
            return None
        return 1 - (1 - after / before) / self.settings.every_steps

    def _acts_at(self, run: Run) -> bool:
        """Say whether this step is corrected, or looked at."""
        if self.switch.on:
            return run.step % self.settings.every_steps == 0
        since = run.step - self._snapshot.step
        return self.switch.looks and since in looked_at(self._snapshot.interval(run))

    def _act(self, run: Run) -> None:
        """Measure what the correction of this step leaves, and correct it in place where AGENT is on."""
        acts = self.form.acts
        snapshot_loss, snapshot_gradient = self._snapshot.gradient(run, needed=acts)
        current_loss = run.seen.losses @ run.batch.weights / run.batch.total
        self.form.observe_losses(torch.stack([current_loss, snapshot_loss]))
        c = torch.as_tensor(self.form.c, dtype=torch.float64, device=run.worker.device)
        left = torch.full_like(c, torch.nan)
        if acts:
            gradient = [_gradient_of(parameter) for parameter in trained_parameters(run.model)]
            weights = self.form.weights(len(gradient)).to(run.worker.device)
            left = self._measure(run, gradient, snapshot_gradient, weights)
            if self.switch.on:
                correct(gradient, snapshot_gradient, self._snapshot.full, weights)
        self.unread.append((run.step, self.switch.on and acts, torch.stack([c, left])))

    def _measure(self, run: Run, current: list[Tensor], snapshot: list[Tensor], weights: Tensor) -> Tensor:
        """Compare a step's gradients with those of the step before, for c; return what these weights leave."""
        before = self.before
        self.before = Gradients(run.step, [tensor.clone() for tensor in current], snapshot)
        gap = self.settings.every_steps if self.switch.on else 1
        if before is None or before.step + gap != run.step:
            return torch.full((), torch.nan, dtype=torch.float64, device=run.worker.device)
        moments = spread(current, snapshot, before.current, before.snapshot)
        run.worker.share([moments])  # another processor may round otherwise
        self.form.observe(moments)
        found = variance_left(moments, weights)
        self.variance += found
        after, raw = found
        return after / raw

    def _read(self) -> None:
        """Bring the latest measurements from the device, all at once."""
        if not self.unread:
            return
        measured = torch.stack([values for _, _, values in self.unread]).tolist()
        for (step, corrected, _), (c, left) in zip(self.unread, measured, strict=True):
            self.history.append((step, corrected, c, left, self.line))
        self.unread = []


def _gradient_of(parameter: nn.Parameter) -> Tensor:
    """Return a parameter's gradient; zeros, which nothing reads, where the forward pass does not use it."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _finding(corrected: int, steps: int, left: float | None, line: float) -> str:
    """Say in a line what the correction did, and whether it paid."""
    if left is None:
        return "AGENT corrected no step: its weight c stayed 0"
    larger = f"a batch {1 / line:.3g} times as large, which costs as much, leaves {line:.2f}"
    if not corrected:
        return f"AGENT corrected no step, which would have left {left:.2f} of the gradients' variance: {larger}"
    return (
        f"AGENT corrected {corrected:,} of {steps:,} steps, which left {left:.2f} of the gradients' variance at last:"
        f" {larger} (plots/correction.png)"
    )


@hook("agent", source="arXiv:2301.03573")
def agent(*, job: Job, samples: Samples, options: AgentOptions = DEFAULTS) -> Correction:
    """Correct gradients by those of a snapshot of the model, with an adaptive weight (AGENT)."""
    options.check(job.samples_used(samples), job.training)
    return Correction(options)
