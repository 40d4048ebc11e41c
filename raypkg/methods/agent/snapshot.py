"""The snapshot in a run: passes over its batches, gradients that serve the steps again, repeated dropout masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator, seeded
from raypkg.data.coreset import Coreset
from raypkg.engine.batches import Batch, Batches, dtype_of, plain_batches
from raypkg.engine.costs import Cost
from raypkg.engine.loop import autocast, losses_of
from raypkg.engine.run import Run
from raypkg.engine.worker import memory_bound

from .correction import GradientCorrection, mean_over_ranks
from .settings import AgentOptions

FULL_GRADIENT = "full gradient"  # the bill of g̃
CORRECTION = "correction"  # the bill of ∇ℓ_B(θ̃)


class Snapshot:
    """The passes of a `GradientCorrection` over a run's batches: g̃ over those of the coming epoch, with bills.

    If the model draws at random, as dropout does, the snapshot repeats the model's draws on a step's batch, and has
    draws of its own for g̃. A model whose draws it cannot repeat is refused.

    Without such draws, g̃ is the mean of the gradients that the steps need. If those of an epoch's corrected steps fit
    into ``settings.memory`` (4 bytes · parameters · steps), they are kept: a sample costs two gradients, not three.
    """

    def __init__(self, run: Run, settings: AgentOptions):
        self.settings = settings
        self.step = 0  # of training, at which it was taken
        self.kept: dict[int, list[Tensor]] = {}  # step → this worker's part of ∇ℓ_B(θ̃)
        self.draws: RepeatedDraws | None = None  # of a model that draws at random

        def frozen_loss(model: nn.Module, numbered: tuple[int, Batch]) -> Tensor:
            """Return the loss of a batch for ĉ; both models have the same draws."""
            number, batch = numbered
            run.bill(FULL_GRADIENT).forward += len(batch.y)
            with seeded(run.seed, "coefficient", run.step, number, run.worker.rank):
                return torch.stack([*self._parts(run, batch, model)]).sum()

        epochs = run.settings.epochs if settings.form == "linear" else None
        self.agent = GradientCorrection(
            run.model, settings.form, gamma=settings.gamma, alpha=settings.alpha, epochs=epochs, loss=frozen_loss
        )
        if _draws(self.agent.copy, run):
            if run.settings.compile:
                raise UserError(
                    "agent does not go with train.compile = true for a model that draws at random, as dropout does"
                )
            self.draws = RepeatedDraws(run.model, run.worker.device)

    def take(self, run: Run) -> None:
        """Take the snapshot, θ̃ ← θ."""
        self.agent.take(run.epoch / run.settings.epochs)
        self.step = run.step
        self.kept = {}

    def average(self, run: Run) -> None:
        """Compute g̃ over the training samples, or over ``settings.samples`` of them."""
        coreset = run.coreset
        count = self.settings.samples
        if count and count < len(coreset):
            rng = generator(run.seed, "full gradient", run.step)
            drawn = torch.randperm(len(coreset), generator=rng)[:count]
            coreset = Coreset(coreset.indices[drawn], coreset.weights[drawn])
        batches = self._batches(run, coreset)
        steps = range(run.step, run.step + len(batches))
        keeps = coreset is run.coreset and self._keeps(run)
        bill = run.bill(FULL_GRADIENT)

        def parts() -> Iterator[tuple[list[Tensor], float]]:
            for step, batch in zip(steps, batches.epoch(run.epoch), strict=True):
                gradient = self._gradient(run, batch)
                if keeps and step % self.settings.every_steps == 0:
                    self.kept[step] = gradient
                bill.forward += len(batch.y)
                bill.backward += len(batch.y)
                yield gradient, batch.total / len(coreset)  # batches may differ by a sample

        with seeded(run.seed, "full gradient", run.step, run.worker.rank):
            self.agent.average(parts())
        _bill_exchange(run, bill, self.agent.full)

    def gradient(self, run: Run) -> list[Tensor]:
        """Return ∇ℓ_B(θ̃) of the present step, over all workers."""
        bill = run.bill(CORRECTION)
        gradient = self.kept.get(run.step)
        if gradient is None:
            batch = run.batch
            # The snapshot's draws leave the global generators as they were.
            with seeded(run.seed, "correction", run.step, run.worker.rank):
                if self.draws:
                    self.draws.repeat(batch.x)
                gradient = self._gradient(run, batch)
            bill.forward += len(batch.y)
            bill.backward += len(batch.y)
        # DDP has averaged the model's gradient over the workers; that of the snapshot is still each worker's own.
        _bill_exchange(run, bill, gradient)
        return mean_over_ranks(gradient)

    def estimate(self, run: Run) -> None:
        """Update the published c by the losses of the epoch's batches, before another snapshot is taken."""
        self.agent.estimate(enumerate(self._batches(run, run.coreset).epoch(run.epoch)))

    def _batches(self, run: Run, coreset: Coreset) -> Batches:
        size, dtype = run.settings.batch_size, dtype_of(run.model)
        return Batches(run.split, coreset, size, seed=run.seed, augment=run.augment, worker=run.worker, dtype=dtype)

    def gradients_per_step(self, run: Run) -> float:
        """Return q, the gradients that a step computes on average while steps are corrected."""
        n = len(run.coreset)
        samples = min(self.settings.samples or n, n)
        for_full = samples / (self.interval(run) * n / run.settings.steps_per_epoch(n))
        serve_steps = samples == n and self._keeps(run)
        return 1 + for_full + (0 if serve_steps else 1 / self.settings.every_steps)

    def interval(self, run: Run) -> int:
        """Return the steps from one snapshot to the next."""
        return self.settings.snapshot_every_steps or run.settings.steps_per_epoch(len(run.coreset))

    def _keeps(self, run: Run) -> bool:
        """Return True if g̃'s gradients of the corrected steps are kept for these steps.

        The steps must see the same batches, with the same draws, before the next snapshot, and memory must suffice.
        """
        if self.draws or self.settings.snapshot_every_steps or any(hook.supplies_batches for hook in run.hooks):
            return False
        corrected = -(-run.settings.steps_per_epoch(len(run.coreset)) // self.settings.every_steps)
        size = corrected * sum(parameter.nbytes for parameter in self.agent.parameters)
        device = run.worker.device
        if self.settings.memory is None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return size <= free // 4
        return size <= memory_bound(self.settings.memory)

    def _parts(self, run: Run, batch: Batch, model: nn.Module) -> Iterator[Tensor]:
        """Yield the objective on a batch, by the parts of training; the mean over workers is the whole."""
        for part in batch.parts(run.settings.micro_batch):
            with autocast(run.settings.precision, part.x.device):
                logits = model(part.x)
            losses = losses_of(logits, part.y, run.settings.label_smoothing)
            yield losses @ part.weights / part.total * run.worker.world

    def _gradient(self, run: Run, batch: Batch) -> list[Tensor]:
        """Return this worker's part of ∇ℓ_B(θ̃)."""
        return self.agent.gradient(self._parts(run, batch, self.agent.copy))

    def state_dict(self) -> dict[str, Any]:
        """Return weights, step and g̃, which steps of a later epoch need."""
        return {"model": self.agent.copy.state_dict(), "step": self.step, "full": list(self.agent.full)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the state."""
        self.agent.copy.load_state_dict(state["model"])
        self.step = state["step"]
        self.agent.full = [gradient.to(device) for gradient in state["full"]]


def _bill_exchange(run: Run, bill: Cost, tensors: list[Tensor]) -> None:
    if run.worker.world > 1:
        bill.sent += sum(tensor.nbytes for tensor in tensors)


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
def _draws(model: nn.Module, run: Run) -> bool:
    """Return True if a pass of the model draws from torch's generators; it moves the model's running statistics.

    A trial finds more than a list of layers would: dropout within attention, and a user's model that draws. Draws from
    other generators, whose states cannot be restored, are refused.
    """
    indices = run.coreset.indices[:8]
    x, _ = next(plain_batches(run.split, indices, run.worker.device, len(indices), dtype_of(model)))
    model.train()
    outputs = []
    moved = False
    for _ in range(2):
        with seeded(run.seed, "probe"):
            before = _generator_states(run.worker.device)
            outputs.append(model(x))
            after = _generator_states(run.worker.device)
        moved = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    if not torch.allclose(outputs[0], outputs[1], equal_nan=True):
        raise UserError(
            "agent: the model gives one batch two outputs with torch's generators set back: its draws are of another"
            " kind, and it would differ from its snapshot by noise"
        )
    return moved
