"""The snapshot of the model: its gradient on a batch, and the full gradient, whose parts serve the steps again."""

from __future__ import annotations

from collections.abc import Mapping
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

from .repeated_draws import RepeatedDraws, states_of
from .settings import AgentOptions

PROBED = 8  # samples
FULL_GRADIENT = "full gradient"  # the bill of g̃
CORRECTION = "correction"  # the bill of ∇ℓ_B(θ̃)


class Snapshot:
    """θ̃, with g̃ = mean of ∇ℓ_B(θ̃) over the samples of the batches of the coming epoch.

    It normalises by the statistics of its batches, as the model does, and keeps its running ones to itself. Where the
    model draws at random, as dropout does, it draws on a step's batch what the model drew there, and for g̃ anew.

    The gradients that g̃ is the mean of are those that the steps need, but for such draws. Where those of an epoch's
    corrected steps fit into ``settings.memory`` (4 bytes · parameters · steps) they are kept: a sample costs two
    gradients, not three.

    Args:
        run: whose model it is of.
        settings: how often steps are corrected, over which samples g̃ is, and the memory.

    Raises:
        UserError: the model draws at random in a way that its snapshot cannot repeat.
    """

    def __init__(self, run: Run, settings: AgentOptions):
        self.settings = settings
        self.model = deepcopy(run.model)
        self.step = 0  # of training, at which it was taken
        self.full: list[Tensor] = []  # g̃, one tensor a parameter; empty where nothing is corrected
        self.kept: dict[int, tuple[Tensor, list[Tensor]]] = {}  # ℓ_B(θ̃) and its gradient, of each step to correct
        self.draws: RepeatedDraws | None = None  # of a model that draws at random
        if not _draws(self.model, run):
            return
        if run.settings.compile:
            raise UserError(
                "agent with a model that draws at random, as dropout does, does not go with train.compile = true: a"
                " compiled model draws by itself"
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
        """Compute g̃, over the samples used for training or a draw of them."""
        coreset = self._drawn(run)
        batches = Batches(
            run.split,
            coreset,
            run.settings.batch_size,
            seed=run.seed,
            augment=run.augment,
            worker=run.worker,
            dtype=dtype_of(run.model),
        )
        steps = range(run.step, run.step + len(batches))
        keeps = coreset is run.coreset and self._keeps(run)
        total = [torch.zeros_like(parameter) for parameter in trained_parameters(run.model)]
        bill = run.bill(FULL_GRADIENT)
        with seeded(run.seed, "full gradient", run.step, run.worker.rank):
            for step, batch in zip(steps, batches.epoch(run.epoch), strict=True):
                loss, gradient = self._gradient(run, batch)
                torch._foreach_add_(total, gradient, alpha=batch.total / len(coreset))  # batches may differ by a sample
                if keeps and step % self.settings.every_steps == 0:
                    self.kept[step] = (loss.detach(), gradient)
                bill.forward += len(batch.y)
                bill.backward += len(batch.y)
        self.full = _summed(run, total, bill)

    def gradient(self, run: Run, *, needed: bool = True) -> tuple[Tensor, list[Tensor]]:
        """Return this worker's share of ℓ_B(θ̃) of the present step, and ∇ℓ_B(θ̃) over all workers where it is needed."""
        bill = run.bill(CORRECTION)
        if run.step in self.kept:
            loss, gradient = self.kept[run.step]
        else:
            batch = run.batch
            # What the snapshot draws leaves the global generators as they were.
            with seeded(run.seed, "correction", run.step, run.worker.rank), torch.set_grad_enabled(needed):
                if self.draws:
                    self.draws.repeat(batch.x)
                loss, gradient = self._gradient(run, batch)
            bill.forward += len(batch.y)
            bill.backward += len(batch.y) if needed else 0
        # DDP has averaged the model's gradient over the workers; that of the snapshot is still each worker's own.
        return loss.detach(), _summed(run, gradient, bill)

    def gradients_a_step(self, run: Run) -> float:
        """Return q, the gradients that a step computes on average while steps are corrected."""
        steps = self.interval(run)
        samples = min(self.settings.samples or len(run.coreset), len(run.coreset))
        for_full = samples / (steps * len(run.coreset) / run.settings.steps_per_epoch(len(run.coreset)))
        serve = samples == len(run.coreset) and self._keeps(run)
        for_correction = 0 if serve else 1 / self.settings.every_steps
        return 1 + for_full + for_correction

    def interval(self, run: Run) -> int:
        """Return the steps from one snapshot to the next."""
        return self.settings.snapshot_every_steps or run.settings.steps_per_epoch(len(run.coreset))

    def state_dict(self) -> dict[str, Any]:
        """Return what steps of a later epoch need."""
        return {"model": self.model.state_dict(), "step": self.step, "full": list(self.full)}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore it."""
        self.model.load_state_dict(state["model"])
        self.step = state["step"]
        self.full = [gradient.to(device) for gradient in state["full"]]

    def close(self) -> None:
        """Stop watching the model."""
        if self.draws:
            self.draws.close()

    def _drawn(self, run: Run) -> Coreset:
        """Return the samples of the full gradient: those used for training, or some of them drawn anew."""
        coreset = run.coreset
        count = self.settings.samples
        if not count or count >= len(coreset):
            return coreset
        rng = generator(run.seed, "full gradient", run.step)
        drawn = torch.randperm(len(coreset), generator=rng)[:count]
        return Coreset(coreset.indices[drawn], coreset.weights[drawn])

    def _keeps(self, run: Run) -> bool:
        """Say whether the gradients of an epoch's corrected steps are kept, which g̃ is the mean of.

        They can be kept only where the steps will see the same batches, with the same draws, and all of them lie before
        the next snapshot.
        """
        supplied = any(hook.supplies_batches for hook in run.hooks)
        if supplied or self.draws or self.settings.snapshot_every_steps:
            return False
        corrected = -(-run.settings.steps_per_epoch(len(run.coreset)) // self.settings.every_steps)
        size = corrected * sum(parameter.nbytes for parameter in trained_parameters(self.model))
        return size <= self._room(run.worker.device)

    def _room(self, device: torch.device) -> int:
        """Return the bytes that kept gradients may take."""
        if self.settings.memory is None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return free // 4
        return memory_bound(self.settings.memory)

    def _gradient(self, run: Run, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Return this worker's share of ℓ_B(θ̃), and of its gradient where gradients are enabled.

        The batch goes through the snapshot in the parts in which it goes through the model.
        """
        losses = []
        total: list[Tensor] = []
        for part in batch.parts(run.settings.micro_batch):
            loss, gradient = self._gradient_of_part(run, part)
            losses.append(loss)
            total = list(torch._foreach_add(total, gradient)) if total else gradient
        return torch.stack(losses).sum(), total

    def _gradient_of_part(self, run: Run, part: Batch) -> tuple[Tensor, list[Tensor]]:
        with autocast(run.settings.precision, part.x.device):
            logits = self.model(part.x)
        loss = losses_of(logits, part.y) @ part.weights / part.total
        if not loss.requires_grad:
            return loss, []
        objective = loss  # c is of plain losses, the gradient of what is trained
        if smoothing := run.settings.label_smoothing:
            objective = losses_of(logits, part.y, smoothing) @ part.weights / part.total
        gradient = torch.autograd.grad(
            objective,
            trained_parameters(self.model),
            allow_unused=True,  # layers that the forward pass does not use
            materialize_grads=True,
        )
        return loss.detach(), list(gradient)


def _summed(run: Run, tensors: list[Tensor], bill: Cost) -> list[Tensor]:
    """Return the sum of the workers' tensors, by one all-reduce."""
    if run.worker.world == 1 or not tensors:
        return tensors
    flat = run.worker.sum(torch.cat([tensor.flatten() for tensor in tensors]))
    bill.sent += flat.nbytes
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def _draws(model: nn.Module, run: Run) -> bool:
    """Say whether a model draws from torch's generators in a pass over a batch; its running statistics move.

    Trying it out finds what no list of layers would: attention's own dropout, and a user's model that draws.

    Raises:
        UserError: it draws from others, which cannot be set back.
    """
    indices = run.coreset.indices[:PROBED]
    x, _ = next(plain_batches(run.split, indices, run.worker.device, len(indices), dtype_of(model)))
    model.train()
    outputs = []
    moved = False
    for _ in range(2):
        with seeded(run.seed, "probe"):
            before = states_of(run.worker.device)
            outputs.append(model(x))
            after = states_of(run.worker.device)
        moved = any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    first, second = outputs
    if not torch.allclose(first, second, equal_nan=True):
        raise UserError(
            "agent: the model gives one batch two outputs with torch's generators set back: its draws are of another"
            " kind, and it would differ from its snapshot by noise"
        )
    return moved
