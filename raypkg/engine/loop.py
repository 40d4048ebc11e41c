"""The one training loop: every method of the product is a coreset, a hook, or both, on this."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import seeded
from raypkg.data.split import Split

from .batches import Batch, dtype_of, plain_batches, slice_of
from .costs import Cost
from .run import Run, Seen
from .schedules import learning_rate
from .worker import Worker


class Checkpoints(Protocol):
    """Where a run's state is kept between epochs."""

    def load(self) -> dict[str, Any] | None:
        """Return the newest complete state, or None."""

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Keep a state; never leaves a half-written one."""


class Forgetful:
    """Keeps no checkpoints: for runs too short to be worth one."""

    def load(self) -> dict[str, Any] | None:
        """Return None."""
        return None

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Keep nothing."""


def fit(
    run: Run,
    *,
    checkpoints: Checkpoints | None = None,
    measure: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> Run:
    """Train to the run's last epoch, continuing from the newest checkpoint if there is one.

    Args:
        run: what to train; its model holds the result.
        checkpoints: where state is kept after each epoch.
        measure: computes further metrics of the model after each epoch, given its number.

    Raises:
        UserError: the loss of an epoch is not finite; the last good checkpoint stays.

    >>> from raypkg.engine.run import Run
    >>> split = Split.from_tensors(torch.arange(12.0).view(6, 2), torch.arange(6) % 2)
    >>> run = fit(Run.simple(nn.Linear(2, 2), split, epochs=2, batch_size=3))
    >>> run.epoch, run.step
    (2, 4)
    """
    checkpoints = checkpoints or Forgetful()
    with seeded(run.seed, "start"):
        for hook in run.hooks:
            hook.on_start(run)
    # One reads for all: workers of an attempt that was lost may write another checkpoint while others read.
    if state := run.worker.first(checkpoints.load() if run.worker.rank == 0 else None):
        run.load_state_dict(state)
        _report_again(run)
    model = _prepared(run)
    while run.epoch < (run.last or run.settings.epochs):
        row = _run_epoch(run, model)
        if measure:
            row |= measure(run.model, run.epoch)
        bills = run.bills()
        run.rows.append(_metrics(run, row, bills))
        if run.worker.rank == 0:
            checkpoints.save(run.epoch, run.state_dict(bills))
            run.worker.report(run.rows[-1])
    return run


def _report_again(run: Run) -> None:
    """Report the epochs of a checkpoint again: the process may have died before it wrote their rows."""
    if run.worker.rank == 0:
        for row in run.rows:
            run.worker.report(row)


def _prepared(run: Run) -> nn.Module:
    model = run.worker.distribute(run.model)
    return torch.compile(model) if run.settings.compile else model  # type: ignore[return-value]


def _metrics(run: Run, row: dict[str, float], bills: Sequence[Cost]) -> dict[str, Any]:
    """Return an epoch's row of metrics, with what all parts of the run have cost so far."""
    identity = {"phase": run.phase, "main": run.main, "model": run.label, "epoch": run.epoch}
    return {**identity, **row, "backward": sum(bill.backward for bill in bills)}


def _run_epoch(run: Run, model: nn.Module) -> dict[str, float]:
    """Train one epoch with its hooks; what layers such as dropout draw follows from seed, epoch and worker."""
    with seeded(run.seed, "dropout", run.epoch, run.worker.rank):
        for hook in run.hooks:
            hook.on_epoch(run)
        with run.cost:
            row = _train_epoch(run, model)
            for hook in run.hooks:
                hook.on_epoch_end(run)
    run.epoch += 1
    return row


def _train_epoch(run: Run, model: nn.Module) -> dict[str, float]:
    steps, batches = run.batches()
    model.train()
    totals = torch.zeros(3, dtype=torch.float64, device=run.worker.device)  # Σ w·loss, correct, samples
    for number, batch in enumerate(batches):
        run.progress = (run.epoch + number / steps) / run.settings.epochs
        rate = learning_rate(run.settings, run.progress)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        totals += _train_step(run, model, batch, run.worker.world)
    loss, correct, samples = run.worker.sum(totals).tolist()
    if not math.isfinite(loss):
        kept = f"; the checkpoint of epoch {run.epoch} stays" if run.epoch else ""
        raise UserError(
            f"the loss became {loss} in epoch {run.epoch + 1} of phase {run.phase!r}"
            f" (lr {run.settings.lr}): lower the learning rate{kept}"
        )
    return {"loss": loss / samples, "train_accuracy": correct / samples, "lr": rate}


def _train_step(run: Run, model: nn.Module, batch: Batch, world: int) -> Tensor:
    """Take one step of the optimiser; return Σ w·loss, hits and samples of this worker's part, float64 [3]."""
    with autocast(run.settings.precision, batch.x.device):
        logits = model(batch.x)
    losses = losses_of(logits, batch.y)
    objective = losses @ batch.weights  # Σ w·loss
    hits = logits.detach().argmax(1) == batch.y
    run.batch = batch
    run.seen = Seen(batch.indices, losses.detach(), hits)
    # DDP averages over workers, so each one's share of Σ w·loss / total is scaled up by their number.
    (objective * (world / batch.total)).backward()
    for hook in run.hooks:
        hook.on_gradients(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    _bill_step(run, len(batch.y))
    for hook in run.hooks:
        hook.on_step(run)
    count = torch.tensor(len(batch.y), device=losses.device)
    return torch.stack([objective.detach().double(), hits.sum().double(), count.double()])


def _bill_step(run: Run, samples: int) -> None:
    run.cost.forward += samples
    run.cost.backward += samples
    if run.worker.world > 1:  # DDP's all-reduce of the gradients
        run.cost.sent += sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())


def losses_of(logits: Tensor, y: Tensor) -> Tensor:
    """Return the samples' cross-entropy, computed in at least 32 bits, [b]."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which matrix products run in the chosen precision; ``auto`` asks the processor."""
    wanted = precision == "bfloat16" or (precision == "auto" and computes_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def computes_bfloat16(device: torch.device) -> bool:
    """Say whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    indices: Tensor | None = None,
    worker: Worker | None = None,
    cost: Cost | None = None,
    *,
    precision: str = "auto",
) -> dict[str, float]:
    """Return mean loss and accuracy over the indices of rank 0's model, every worker taking its slice of them.

    Args:
        model: in any mode, which is restored.
        split: the samples.
        indices: int64 [n]; None = all.
        worker: where to compute; None = on the CPU.
        cost: the bill that it goes on.
        precision: of matrix products.

    >>> from raypkg.data.split import Split
    >>> split = Split.from_tensors(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    >>> model = nn.Linear(1, 2)
    >>> _ = model.weight.data.copy_(torch.tensor([[-9.0], [9.0]]))
    >>> evaluate(model, split)["accuracy"]
    1.0
    """
    if not isinstance(split, Split):
        raise UserError(f"a {type(split).__name__} is no Split, such as load_data(…).test")
    indices = torch.arange(len(split)) if indices is None else indices
    worker = worker or Worker()
    cost = cost or Cost("evaluate")
    was_training = model.training
    mine = slice_of(indices, worker)
    totals = torch.zeros(2, dtype=torch.float64, device=worker.device)  # Σ loss, correct
    with cost:
        worker.share(model.buffers())
        model.eval()
        for x, y in plain_batches(split, mine, worker.device, dtype=dtype_of(model)):
            with autocast(precision, worker.device):
                logits = model(x)
            loss = losses_of(logits, y).sum()
            correct = (logits.argmax(1) == y).sum()
            totals += torch.stack([loss.double(), correct.double()])
        model.train(was_training)
        mean_loss, accuracy = (worker.sum(totals) / max(1, len(indices))).tolist()
    cost.forward += len(mine)
    return {"loss": mean_loss, "accuracy": accuracy}
