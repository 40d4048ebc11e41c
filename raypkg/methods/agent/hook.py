"""AGENT as a hook: corrects the gradients of steps by those of a snapshot of the model, while worthwhile."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import seeded
from raypkg.engine.batches import Batch, Batches, dtype_of, plain_batches
from raypkg.engine.loop import autocast, losses_of, scored
from raypkg.engine.run import Hook, Results, Run, hook
from raypkg.engine.worker import Cost, memory_bound
from raypkg.experiments.samples import Samples
from raypkg.experiments.training import Job
from raypkg.runs.plots import BLUE, GREY, VERMILLION, Rows, column, page

from .control_variate import Switch, steps_of_look
from .correction import GradientCorrection, mean_over_ranks
from .settings import AgentOptions

FULL_GRADIENT = "full gradient"  # the bill of g̃
CORRECTION = "correction"  # the bill of ∇ℓ_B(θ̃)
COLUMNS = ("step", "corrected", "c", "left", "line")  # left: share of the variance, NaN if unknown
DEFAULTS = AgentOptions()


class Correction(Hook):
    """Drives a run's `GradientCorrection`: snapshots over the coming epoch's batches, bills, and a switch.

    It acts after hooks that use the raw gradient (RigL grows on it) and before those that zero pruned weights. Momentum
    sees the corrected gradient; weight decay is not corrected. ĉ comes from a pass over the epoch's batches at its end.
    With the form "measured", nothing is corrected while a larger batch of the same cost would leave less variance.

    If the model draws at random, as dropout does, a snapshot repeats the model's draws on a step's batch, and has draws
    of its own for g̃: an unbiased estimate of its mean gradient over all draws. Otherwise g̃ is the mean of the gradients
    that the steps need. If those of an epoch fit into a quarter of the memory (4 bytes · parameters · steps), they are
    kept: a sample costs two gradients, not three.

    Differs from the paper: g̃ is over the augmented batches of the coming epoch, unless another hook supplies those.
    """

    priority = 10
    agent: GradientCorrection  # made at the start

    def __init__(self, settings: AgentOptions):
        self.settings = settings
        self.switch = Switch(settings.always or settings.form != "measured")
        self.taken = 0  # step of training at the snapshot
        self.kept: dict[int, list[Tensor]] = {}  # step → this worker's part of ∇ℓ_B(θ̃)
        self.draws: RepeatedDraws | None = None  # of a model that draws at random
        self.line = 0.0  # 1/q
        self.left: float | None = None  # share of the variance, at the latest judgement
        self.unread: list[tuple[int, bool, Tensor]] = []  # step, corrected, (c, left) on the device
        self.history: list[tuple[float, ...]] = []  # ``COLUMNS`` of every step that was corrected or looked at

    def on_start(self, run: Run) -> None:
        """Copy the model for the snapshot."""

        def frozen_loss(model: nn.Module, numbered: tuple[int, Batch]) -> Tensor:  # for ĉ, with equal draws of both
            number, batch = numbered
            run.bill(FULL_GRADIENT).forward += len(batch.y)
            with seeded(run.seed, "coefficient", run.step, number, run.worker.rank):
                return torch.stack([*_parts(run, batch, model)]).sum()

        settings = self.settings
        epochs = run.settings.epochs if settings.form == "linear" else None
        self.agent = GradientCorrection(
            run.model, settings.form, gamma=settings.gamma, alpha=settings.alpha, epochs=epochs, loss=frozen_loss
        )
        if draws_at_random(self.agent.copy, run):
            if run.settings.compile:
                reason = "for a model that draws at random, as dropout does"
                raise UserError(f"agent does not go with train.compile = true {reason}")
            self.draws = RepeatedDraws(run.model, run.worker.device)

    def on_epoch(self, run: Run) -> None:
        """Judge the variance left since the last snapshot, take a new one, and compute g̃ if steps are corrected."""
        weight = self.agent.weight
        self.agent.before = None
        with run.bill(FULL_GRADIENT) as bill:
            # Rank 0 decides for all workers: other processors may round differently.
            left = run.worker.first(self.agent.variance_left)
            self.left = self.left if left is None else left
            self.switch.decide(left, self.line, rate=run.optimizer.param_groups[0]["lr"], epoch=run.epoch)
            self.agent.take(run.epoch / run.settings.epochs)
            self.taken, self.kept = run.step, {}
            weight.load_state_dict(run.worker.first(weight.state_dict()), run.worker.device)

            # Steps take the gradients that g̃ is the mean of if they see the same batches, with the same draws, and
            # memory suffices. A corrected step computes q gradients: its own, its part of g̃, and the snapshot's
            # unless kept.
            steps, device = run.settings.steps_per_epoch(len(run.coreset)), run.worker.device
            size = steps * sum(parameter.nbytes for parameter in self.agent.parameters)
            bound = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else memory_bound(None)
            keeps = size <= bound and not self.draws and not any(hook.supplies_batches for hook in run.hooks)
            self.line = 1 / 2 if keeps else 1 / 3
            if not (self.switch.on and weight.acts):
                return

            def parts() -> Iterator[tuple[list[Tensor], float]]:
                for step, batch in enumerate(_batches(run).epoch(run.epoch), run.step):
                    gradient = self._gradient(run, batch, bill)
                    if keeps:
                        self.kept[step] = gradient
                    yield gradient, batch.total / len(run.coreset)  # batches may differ by a sample

            with seeded(run.seed, "full gradient", run.step, run.worker.rank):
                self.agent.average(parts())
            _bill_exchange(run, bill, self.agent.full)

    def on_gradients(self, run: Run) -> None:
        """Correct the gradients of this step, or look at them."""
        steps = run.settings.steps_per_epoch(len(run.coreset))
        looks = self.switch.looks and run.step - self.taken in steps_of_look(steps)
        if (self.switch.on or looks) and self.agent.weight.acts:
            with run.cost.apart(run.bill(CORRECTION)):
                gradient = self.kept.get(run.step)
                if gradient is None:
                    # The snapshot's draws leave the global generators as they were.
                    with seeded(run.seed, "correction", run.step, run.worker.rank):
                        if self.draws:
                            self.draws.repeat(run.batch.x)
                        gradient = self._gradient(run, run.batch, run.bill(CORRECTION))
                # DDP has averaged the model's gradient over the workers; the snapshot's is still each worker's own.
                _bill_exchange(run, run.bill(CORRECTION), gradient)
                found = self.agent.apply(mean_over_ranks(gradient), step=run.step, corrects=self.switch.on)
                self.unread.append((run.step, self.switch.on, torch.stack(found)))

    def _gradient(self, run: Run, batch: Batch, bill: Cost) -> list[Tensor]:
        """Return this worker's part of ∇ℓ_B(θ̃)."""
        bill.forward += len(batch.y)
        bill.backward += len(batch.y)
        return self.agent.gradient(_parts(run, batch, self.agent.copy))

    def on_epoch_end(self, run: Run) -> None:
        """Estimate the published c, and read measurements from the device: a checkpoint follows."""
        with run.bill(FULL_GRADIENT):
            self.agent.estimate(enumerate(_batches(run).epoch(run.epoch)))
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
        latest = self.agent.variance_left
        left = self.left if latest is None else latest
        larger = f"a batch {1 / self.line:.3g} times as large, at the same cost, leaves {self.line:.2f}"
        if left is None:
            finding = "AGENT corrected no step: its weight c stayed 0"
        elif not corrected:
            finding = f"AGENT corrected no step, which would leave {left:.2f} of the gradients' variance: {larger}"
        else:
            steps = f"AGENT corrected {corrected:,} of {run.step:,} steps"
            variance = f"{left:.2f} of the gradients' variance in the end"
            finding = f"{steps}, which left {variance}: {larger} (plots/correction.png)"
        return Results(
            facts={"corrected_steps": corrected, "variance_left": left, "variance_line": self.line},
            findings=[finding],
            tables={"correction": table},
            plots={"correction": partial(draw, table.to_pylist())},
        )

    def close(self) -> None:
        """Stop observing the model."""
        if self.draws:
            self.draws.handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return weight, switch and measurements: a snapshot does not outlive its epoch."""
        return {
            "form": self.agent.weight.state_dict(),
            "switch": asdict(self.switch),
            "line": self.line,
            "left": self.left,
            "variance": self.agent.variance.clone(),
            "history": torch.tensor(self.history, dtype=torch.float64).view(-1, len(COLUMNS)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state."""
        device = self.agent.variance.device
        self.agent.weight.load_state_dict(state["form"], device)
        self.switch = replace(self.switch, **state["switch"])
        self.line = state["line"]
        self.left = state["left"]
        self.agent.variance = state["variance"].to(device)
        self.history = [tuple(row) for row in state["history"].tolist()]


def draw(steps: Rows, path: str | Path) -> None:
    """Draw the weight c and the variance left beside that of a batch of the same cost; rows have ``COLUMNS``."""
    step = column(steps, "step")
    c = column(steps, "c")
    left = column(steps, "left")
    corrected = column(steps, "corrected") == 1
    known = np.isfinite(left)
    last_c = f"{c[-1]:.3g}" if len(c) else "–"
    median = f"{np.median(left[known]):.2g}" if known.any() else "–"

    with page(path) as figure:
        weight, variance = figure.subplots(2, 1, sharex=True)
        weight.plot(step, c, ".", color=BLUE, markersize=3)
        weight.set_title(f"c ends at {last_c}")

        for label, of_label, colour in (("corrected", corrected, BLUE), ("looked at", ~corrected, GREY)):
            shown = known & of_label
            if shown.any():
                variance.plot(step[shown], left[shown], ".", color=colour, markersize=3, label=label)
        line = column(steps, "line")
        label = "1/q: a batch of the same cost"
        variance.step(step, line, where="post", label=label, color=VERMILLION, linestyle="--", linewidth=1)
        variance.set_title(f"Share of the gradients' variance that is left: {median} (median)")
        variance.set_xlabel("step")
        variance.set_ylim(0, 1.5)  # a correction may add to the variance
        variance.legend(loc="upper right")


def _batches(run: Run) -> Batches:
    size, dtype = run.settings.batch_size, dtype_of(run.model)
    return Batches(run.split, run.coreset, size, seed=run.seed, augment=run.augment, worker=run.worker, dtype=dtype)


def _parts(run: Run, batch: Batch, model: nn.Module) -> Iterator[Tensor]:
    """Yield the objective on a batch, by the parts of training; the mean over workers is the whole."""
    for part in batch.parts(run.settings.micro_batch):
        with autocast(run.settings.precision, part.x.device):
            output = model(part.x)
        smoothing = run.settings.label_smoothing
        losses = losses_of(output, part.y, smoothing) if smoothing else scored(output, part.y)[0]
        yield losses @ part.weights / part.total * run.worker.world


def _bill_exchange(run: Run, bill: Cost, tensors: list[Tensor]) -> None:
    if run.worker.world > 1:
        bill.sent += sum(tensor.nbytes for tensor in tensors)


@hook("agent", source="arXiv:2301.03573")
def agent(*, job: Job, samples: Samples, options: AgentOptions = DEFAULTS) -> Correction:
    """Correct gradients by those of a snapshot of the model, with an adaptive weight (AGENT)."""
    options.check(job.samples_used(samples), job.training)
    return Correction(options)


# The draws of a model in its passes over batches, such as dropout masks, repeated at the snapshot


class RepeatedDraws:
    """The states of torch's generators before a model's latest pass over a batch, to repeat its dropout masks.

    With other masks, the two gradients would differ by noise of their own, which the correction would add to the step.
    Each worker draws by itself, and repeats its own draws.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.device = device
        self.x: Tensor | None = None
        self.states: list[Tensor] = []
        self.handle = model.register_forward_pre_hook(self.note)

    def repeat(self, x: Tensor) -> None:
        """Set the global generators to their states when the model received the batch ``x``."""
        if not self._is_of(x):
            raise UserError("agent: the model draws at random, as dropout does, and its pass was not over this batch")
        torch.set_rng_state(self.states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.states[1], self.device)

    def note(self, model: nn.Module, inputs: tuple[Tensor]) -> None:
        """Note the states before the first pass over a batch; another hook may pass it again."""
        (x,) = inputs
        if model.training and not self._is_of(x):
            self.x = x
            self.states = _generator_states(self.device)

    def _is_of(self, x: Tensor) -> bool:
        """Return True if samples are in the noted batch, which goes through the model whole or in parts."""
        return self.x is not None and x.untyped_storage().data_ptr() == self.x.untyped_storage().data_ptr()


def _generator_states(device: torch.device) -> list[Tensor]:
    """Return the states of the global generators from which layers on a device draw."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


@torch.no_grad()
def draws_at_random(model: nn.Module, run: Run) -> bool:
    """Return True if a pass of the model draws from torch's generators; it moves the model's running statistics.

    A trial finds more than a list of layers would: dropout within attention, and a user's model that draws. Draws from
    other generators, whose states cannot be restored, are refused.
    """
    indices = run.coreset.indices[:8]
    x, _ = next(plain_batches(run.split, indices, run.worker.device, len(indices), dtype_of(model)))
    model.train()
    outputs = []
    for _ in range(2):
        with seeded(run.seed, "probe"):
            before = _generator_states(run.worker.device)
            outputs.append(model(x))
            after = _generator_states(run.worker.device)
    if not torch.allclose(outputs[0], outputs[1], equal_nan=True):
        problem = "agent: the model gives one batch two outputs with torch's generators set back"
        raise UserError(f"{problem}: its draws are of another kind, and it would differ from its snapshot by noise")
    return not all(map(torch.equal, before, after))
