"""AGENT as a hook: corrects the gradients of steps by those of a snapshot of the model, while worthwhile."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from raypkg.engine.hooks import Hook, Results, hook
from raypkg.engine.run import Run
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job

from . import plots
from .control_variate import Switch, steps_of_look
from .correction import GradientCorrection
from .settings import AgentOptions
from .snapshot import CORRECTION, FULL_GRADIENT, Snapshot

COLUMNS = ("step", "corrected", "c", "left", "line")  # left: share of the variance, NaN if unknown
DEFAULTS = AgentOptions()


class Correction(Hook):
    """Drives a run's `GradientCorrection`: snapshots over the coming epoch's batches, and a switch.

    It acts after hooks that use the raw gradient (RigL grows on it) and before those that zero pruned weights. Momentum
    sees the corrected gradient; weight decay is not corrected.

    ĉ comes from a pass over the epoch's batches at its end. With the form "measured", nothing is corrected while a
    larger batch of the same cost would leave less variance.

    Differs from the paper: g̃ is over the augmented batches of the coming epoch, unless another hook supplies those. A
    snapshot repeats the dropout masks of each step, and g̃ has draws of its own: an unbiased estimate of the snapshot's
    mean gradient over all draws.
    """

    priority = 10
    snapshot: Snapshot  # made at the start
    agent: GradientCorrection  # of the snapshot

    def __init__(self, settings: AgentOptions):
        self.settings = settings
        self.switch = Switch(settings.stays_on, settings.look_every_epochs)
        self.line = 0.0  # 1/q
        self.left: float | None = None  # share of the variance, at the latest judgement
        self.unread: list[tuple[int, bool, Tensor]] = []  # step, corrected, (c, left) on the device
        self.history: list[tuple[float, ...]] = []  # ``COLUMNS`` of every step that was corrected or looked at
        self.closing = ExitStack()

    def on_start(self, run: Run) -> None:
        """Copy the model for the snapshot."""
        self.snapshot = Snapshot(run, self.settings)
        self.agent = self.snapshot.agent
        if self.snapshot.draws:
            self.closing.callback(self.snapshot.draws.handle.remove)

    def on_epoch(self, run: Run) -> None:
        """Begin at a new snapshot, unless ``snapshot_every_steps`` is set."""
        self.agent.before = None
        if run.step == 0 or not self.settings.snapshot_every_steps:
            with run.bill(FULL_GRADIENT):
                self._begin(run)

    def on_gradients(self, run: Run) -> None:
        """Correct the gradients of this step, or look at them, after a new snapshot if one is due."""
        interval = self.settings.snapshot_every_steps
        if interval and run.step and run.step % interval == 0:
            with run.cost.apart(run.bill(FULL_GRADIENT)):
                self._begin(run)
        if self.switch.on:
            due = run.step % self.settings.every_steps == 0
        else:
            since = run.step - self.snapshot.step
            due = self.switch.looks and since in steps_of_look(self.snapshot.interval(run))
        if due and self.agent.weight.acts:
            with run.cost.apart(run.bill(CORRECTION)):
                gap = self.settings.every_steps if self.switch.on else 1
                gradient = self.snapshot.gradient(run)
                found = self.agent.apply(gradient, step=run.step, gap=gap, corrects=self.switch.on)
                self.unread.append((run.step, self.switch.on, torch.stack(found)))

    def _begin(self, run: Run) -> None:
        """Judge the variance left since the last snapshot, take a new one, and compute g̃ if steps are corrected."""
        rate = run.optimizer.param_groups[0]["lr"]
        # Rank 0 decides for all workers: other processors may round differently.
        left = run.worker.first(self._left())
        if left is not None:
            self.left = left
            self.switch.judge(left, self.line, rate=rate, epoch=run.epoch)
        self.switch.begin(rate=rate, epoch=run.epoch)
        if self.settings.snapshot_every_steps and run.step:
            self.snapshot.estimate(run)
        self.snapshot.take(run)
        weight = self.agent.weight
        weight.load_state_dict(run.worker.first(weight.state_dict()), run.worker.device)
        self.line = 1 / self.snapshot.gradients_per_step(run)
        if self.switch.on and weight.acts:
            self.snapshot.average(run)

    def _left(self) -> float | None:
        """Return the share of the variance left over all steps, corrected or not; None if unknown."""
        left = self.agent.variance_left
        return None if left is None else 1 - (1 - left) / self.settings.every_steps

    def on_epoch_end(self, run: Run) -> None:
        """Estimate the published c, and read measurements from the device: a checkpoint follows."""
        if not self.settings.snapshot_every_steps:
            with run.bill(FULL_GRADIENT):
                self.snapshot.estimate(run)
        if self.unread:
            measured = torch.stack([values for _, _, values in self.unread]).tolist()
            for (step, corrected, _), (c, left) in zip(self.unread, measured, strict=True):
                self.history.append((step, corrected, c, left, self.line))
            self.unread = []

    def results(self, run: Run) -> Results:
        """Return the measurements of every step that was corrected or looked at, with their plot."""
        columns = np.array(self.history).reshape(-1, len(COLUMNS)).T
        table = pa.table(dict(zip(COLUMNS, columns, strict=True)))
        corrected = int(table["corrected"].to_numpy().sum())
        latest = self._left()
        left = self.left if latest is None else latest
        larger = f"a batch {1 / self.line:.3g} times as large, at the same cost, leaves {self.line:.2f}"
        if left is None:
            finding = "AGENT corrected no step: its weight c stayed 0"
        elif not corrected:
            finding = f"AGENT corrected no step, which would leave {left:.2f} of the gradients' variance: {larger}"
        else:
            finding = (
                f"AGENT corrected {corrected:,} of {run.step:,} steps, which left {left:.2f} of the gradients' variance"
                f" in the end: {larger} (plots/correction.png)"
            )
        return Results(
            facts={"corrected_steps": corrected, "variance_left": left, "variance_line": self.line},
            findings=[finding],
            tables={"correction": table},
            plots={"correction": partial(plots.correction, table.to_pylist())},
        )

    def close(self) -> None:
        """Stop observing the model."""
        self.closing.close()

    def state_dict(self) -> dict[str, Any]:
        """Return weight, switch and measurements, and the snapshot if it outlives an epoch."""
        state = {
            "form": self.agent.weight.state_dict(),
            "switch": asdict(self.switch),
            "line": self.line,
            "left": self.left,
            "variance": self.agent.variance.clone(),
            "history": torch.tensor(self.history, dtype=torch.float64).view(-1, len(COLUMNS)),
        }
        if self.settings.snapshot_every_steps:
            state["snapshot"] = self.snapshot.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        device = self.agent.variance.device
        self.agent.weight.load_state_dict(state["form"], device)
        self.switch = replace(self.switch, **state["switch"])
        self.line = state["line"]
        self.left = state["left"]
        self.agent.variance = state["variance"].to(device)
        self.history = [tuple(row) for row in state["history"].tolist()]
        if self.settings.snapshot_every_steps:
            self.snapshot.load_state_dict(state["snapshot"], device)


@hook("agent", source="arXiv:2301.03573")
def agent(*, job: Job, samples: Samples, options: AgentOptions = DEFAULTS) -> Correction:
    """Correct gradients by those of a snapshot of the model, with an adaptive weight (AGENT)."""
    options.check(job.samples_used(samples), job.training)
    return Correction(options)
