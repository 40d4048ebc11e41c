"""The snapshot θ̃ of the model: its gradient on a batch, and the full gradient, whose parts serve the steps again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
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

from .settings import AgentOptions

FULL_GRADIENT = "full gradient"  # the bill of g̃
CORRECTION = "correction"  # the bill of ∇ℓ_B(θ̃)


class Snapshot:
    """θ̃, with g̃ = mean of ∇ℓ_B(θ̃) over the samples of the batches of the coming epoch.

    It normalises by the statistics of its batches, as the model does while training. If the model draws at random, as
    dropout does, the snapshot repeats the model's draws on a step's batch, and has draws of its own for g̃. A model
    whose draws it cannot repeat is refused.

    Without such draws, g̃ is the mean of the gradients that the steps need. If those of an epoch's corrected steps fit
    into ``settings.memory`` (4 bytes · parameters · steps), they are kept: a sample costs two gradients, not three.
    """

    def __init__(self, run: Run, settings: AgentOptions):
        self.settings = settings
        self.model = deepcopy(run.model)
        self.step = 0  # of training, at which it was taken
        self.full: list[Tensor] = []  # g̃, one tensor per parameter; empty while nothing is corrected
        self.kept: dict[int, list[Tensor]] = {}  # step → ∇ℓ_B(θ̃)
        self.draws: RepeatedDraws | None = None  # of a model that draws at random
        if _draws(self.model, run):
            if run.settings.compile:
                raise UserError(
                    "agent does not go with train.compile = true for a model that draws at random, as dropout does"
                )
            self.draws = RepeatedDraws(run.model, run.worker.device)

    @torch.no_grad()
    def take(self, run: Run) -> None:
        """Copy the weights: θ̃ ← θ. Buffers stay: while training, batch norm uses the statistics of its batch."""
        for mine, current in zip(self.model.parameters(), run.model.parameters(), strict=True):
            mine.copy_(current)
        self.step = run.step
        self.full = []
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
        total = [torch.zeros_like(parameter) for parameter in trained_parameters(run.model)]
        bill = run.bill(FULL_GRADIENT)
        with seeded(run.seed, "full gradient", run.step, run.worker.rank):
            for step, batch in zip(steps, batches.epoch(run.epoch), strict=True):
                gradient = self._gradient(run, batch)
                torch._foreach_add_(total, gradient, alpha=batch.total / len(coreset))  # batches may differ by a sample
                if keeps and step % self.settings.every_steps == 0:
                    self.kept[step] = gradient
                bill.forward += len(batch.y)
                bill.backward += len(batch.y)
        self.full = _summed(run, total, bill)

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
        return _summed(run, gradient, bill)

    @torch.no_grad()
    def losses(self, run: Run) -> Tensor:
        """Return ℓ_B(θ) and ℓ_B(θ̃) of the epoch's batches, both models frozen and with the same draws, [2, batches]."""
        bill = run.bill(FULL_GRADIENT)
        buffers = [buffer.clone() for buffer in run.model.buffers()]  # batch norms are moved by each pass
        found = []
        for number, batch in enumerate(self._batches(run, run.coreset).epoch(run.epoch)):
            for model in (run.model, self.model):
                with seeded(run.seed, "coefficient", run.step, number, run.worker.rank):
                    found.append(torch.stack([*self._parts(run, batch, model)]).sum())
            bill.forward += 2 * len(batch.y)
        for buffer, before in zip(run.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        return run.worker.sum(torch.stack(found)).view(-1, 2).T

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
        size = corrected * sum(parameter.nbytes for parameter in trained_parameters(self.model))
        device = run.worker.device
        if self.settings.memory is None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return size <= free // 4
        return size <= memory_bound(self.settings.memory)

    def _parts(self, run: Run, batch: Batch, model: nn.Module) -> Iterator[Tensor]:
        """Yield this worker's share of the objective on a batch, by the parts in which training passes it."""
        for part in batch.parts(run.settings.micro_batch):
            with autocast(run.settings.precision, part.x.device):
                logits = model(part.x)
            yield losses_of(logits, part.y, run.settings.label_smoothing) @ part.weights / part.total

    def _gradient(self, run: Run, batch: Batch) -> list[Tensor]:
        """Return this worker's share of ∇ℓ_B(θ̃); layers that the forward pass does not use have gradients of 0."""
        parameters = trained_parameters(self.model)
        total: list[Tensor] = []
        for objective in self._parts(run, batch, self.model):
            gradient = torch.autograd.grad(objective, parameters, allow_unused=True, materialize_grads=True)
            total = list(torch._foreach_add(total, gradient)) if total else list(gradient)
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return weights, step and g̃, which steps of a later epoch need."""
        return {"model": self.model.state_dict(), "step": self.step, "full": list(self.full)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore the state."""
        self.model.load_state_dict(state["model"])
        self.step = state["step"]
        self.full = [gradient.to(device) for gradient in state["full"]]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _summed(run: Run, tensors: list[Tensor], bill: Cost) -> list[Tensor]:
    """Return the sum of the workers' tensors, by one all-reduce."""
    if run.worker.world == 1 or not tensors:
        return tensors
    flat = run.worker.sum(torch.cat([tensor.flatten() for tensor in tensors]))
    bill.sent += flat.nbytes
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


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
