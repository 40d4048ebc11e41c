"""The one training loop: every method of the product is a coreset, a hook, or both, on this."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

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

    A run that has trained in this process already goes on as it is.

    A step's samples may go through the model in parts (``micro_batch``), whose gradients add up to those of the whole
    batch; only batch norm sees the parts, and layers that draw, such as dropout, draw otherwise. What is recorded and
    measured is plain cross-entropy; ``label_smoothing`` changes what the gradients are of.

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
    if not run.epoch:
        _begin(run, checkpoints)
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


def _begin(run: Run, checkpoints: Checkpoints) -> None:
    """Start the hooks, and restore the newest checkpoint."""
    with seeded(run.seed, "start"):
        for hook in run.hooks:
            hook.on_start(run)
    # One reads for all: workers of an attempt that was lost may write another checkpoint while others read.
    if state := run.worker.first(checkpoints.load() if run.worker.rank == 0 else None):
        run.load_state_dict(state)
        _report_again(run)


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
    norms = []
    for number, batch in enumerate(batches):
        run.progress = (run.epoch + number / steps) / run.settings.epochs
        rate = learning_rate(run.settings, run.progress)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        totals += _train_step(run, model, batch)
        if run.settings.clip:
            norms.append(run.norm)
    loss, correct, samples = run.worker.sum(totals).tolist()
    if not math.isfinite(loss):
        kept = f"; the checkpoint of epoch {run.epoch} stays" if run.epoch else ""
        raise UserError(
            f"the loss became {loss} in epoch {run.epoch + 1} of phase {run.phase!r}"
            f" (lr {run.settings.lr}): lower the learning rate{kept}"
        )
    return {"loss": loss / samples, "train_accuracy": correct / samples, "lr": rate, **_clipping(run, norms)}


def _clipping(run: Run, norms: Sequence[Tensor]) -> dict[str, float]:
    """Return the mean norm of the gradients before they were clipped, and the share of steps in which they were."""
    if not run.settings.clip:
        return {}
    found = torch.stack(tuple(norms)).double()
    clipped = found > run.settings.clip
    return {"gradient_norm": found.mean().item(), "clipped": clipped.double().mean().item()}


def _train_step(run: Run, model: nn.Module, batch: Batch) -> Tensor:
    """Take one step of the optimiser; return Σ w·loss, hits and samples of this worker's part, float64 [3]."""
    parts = batch.parts(run.settings.micro_batch)
    passed = [_pass(run, model, part, last=part is parts[-1]) for part in parts]
    weighted, losses, hits = _joined(passed)
    run.batch = batch
    run.seen = Seen(batch.indices, losses, hits)
    for hook in run.hooks:
        hook.on_gradients(run)
    if run.settings.clip:
        run.norm = clip_grad_norm_(run.model.parameters(), run.settings.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    _bill_step(run, len(batch.y))
    for hook in run.hooks:
        hook.on_step(run)
    count = torch.tensor(len(batch.y), device=losses.device)
    return torch.stack([weighted.double(), hits.sum().double(), count.double()])


class Passed(NamedTuple):
    """What the model gave for samples of a step: Σ w·loss, the losses and the hits [b], without their graph."""

    weighted: Tensor
    losses: Tensor
    hits: Tensor


def _pass(run: Run, model: nn.Module, part: Batch, *, last: bool) -> Passed:
    """Add the gradient of Σ w·loss / total over a part of the step's samples; after the last, workers share theirs."""
    smoothing = run.settings.label_smoothing
    with nullcontext() if last else _apart(run, model):
        with autocast(run.settings.precision, part.x.device):
            logits = model(part.x)
        losses = losses_of(logits, part.y)
        weighted = losses @ part.weights  # Σ w·loss
        objective = losses_of(logits, part.y, smoothing) @ part.weights if smoothing else weighted
        # DDP averages over workers, so each one's share of Σ w·loss / total is scaled up by their number.
        (objective * (run.worker.world / part.total)).backward()
    hits = logits.detach().argmax(1) == part.y
    return Passed(weighted.detach(), losses.detach(), hits)


def _apart(run: Run, model: nn.Module) -> AbstractContextManager[Any]:
    """Return the context in which gradients add up on each worker by itself."""
    if run.worker.world == 1:
        return nullcontext()
    return model.no_sync()  # type: ignore[operator]  # of DDP


def _joined(passed: Sequence[Passed]) -> Passed:
    if len(passed) == 1:
        return passed[0]
    weighted, losses, hits = zip(*passed, strict=True)
    return Passed(torch.stack(weighted).sum(), torch.cat(losses), torch.cat(hits))


def _bill_step(run: Run, samples: int) -> None:
    run.cost.forward += samples
    run.cost.backward += samples
    if run.worker.world > 1:  # DDP's all-reduce of the gradients
        run.cost.sent += sum(parameter.numel() * parameter.element_size() for parameter in run.model.parameters())


def losses_of(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the samples' cross-entropy, computed in at least 32 bits, [b].

    Args:
        logits: [b, C].
        y: labels [b].
        smoothing: share of each target that is spread over all classes.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, y, reduction="none", label_smoothing=smoothing)


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
