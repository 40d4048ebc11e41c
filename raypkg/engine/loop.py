"""The one training loop and its evaluation: every method is a coreset, a hook, or both, on this loop."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

from raypkg.core.errors import UserError, described, shown
from raypkg.core.seeds import seeded
from raypkg.core.settings import whole_steps
from raypkg.data.kinds import IMAGES
from raypkg.data.split import Split
from raypkg.models.classifier import Answered
from raypkg.models.operations import forward_flops

from .batches import Batch, dtype_of, plain_batches, slice_of
from .run import Run, Seen, build_optimizer, learning_rate
from .worker import Cost, Worker, arithmetic, computes_bfloat16, peak_of, whole

MOST_NATS = 700.0  # e to a larger loss is beyond float64
QUIET = 15.0  # seconds within an epoch without a report of its steps
TRACE = "trace.json.gz"
TRACED = 10  # steps
VIEWS = {"plain": 1, "mirrored": 2, "shifted": 6}  # forward passes of an image in an evaluation


class Checkpoints(Protocol):
    """Storage of a run's state between epochs."""

    def load(self) -> dict[str, Any] | None:
        """Return the newest complete state, or None."""

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Store a state; never leaves a half-written one."""


def fit(
    run: Run,
    *,
    checkpoints: Checkpoints | None = None,
    measure: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> Run:
    """Train to the run's last epoch, from the newest checkpoint if there is one; the run's model holds the result.

    A run that has already trained in this process continues from its current state.

    With ``micro_batch`` a step's samples pass through the model in parts, whose gradients add up to those of the whole
    batch. Batch norm sees only the parts, and layers such as dropout draw other numbers.

    After each epoch the state goes to ``checkpoints``, and ``measure(model, epoch)`` returns further metrics. An epoch
    that was interrupted is repeated: its order and all of its draws follow from the seed and its number.

    Raises:
        UserError: the loss of an epoch is not finite; the last good checkpoint stays.

    >>> split = Split.from_tensors(torch.arange(12.0).view(6, 2), torch.arange(6) % 2)
    >>> run = fit(Run.simple(nn.Linear(2, 2), split, epochs=2, batch_size=3))
    >>> run.epoch, run.step
    (2, 4)
    """
    is_first = run.worker.rank == 0
    modes = partial(arithmetic, run.settings, run.worker.device, fixed_shapes=run.split.kind is IMAGES)
    if not run.epoch:
        with seeded(run.seed, "start"), modes():
            for hook in run.hooks:
                hook.on_start(run)
        if run.sharded:
            if strange := next((hook for hook in run.hooks if not hook.sharded), None):
                kind = type(strange).__name__
                raise UserError(f"cluster.strategy = fsdp: hook {kind} needs complete parameters on each worker")
            run.worker.shard(run.model)
            run.optimizer = build_optimizer(run.model, run.settings)
        # One worker reads for all: those of a lost attempt may write another checkpoint while others read.
        if state := run.worker.first(checkpoints.load() if checkpoints and is_first else None):
            run.load_state_dict(state)
            if is_first:  # again: the process may have died before it stored these rows
                for row in run.rows:
                    run.worker.report(row)
    run.cost.peak = peak_of(run.worker.device, run.settings)
    if run.cost.peak:
        run.flops = training_flops(run.model, run.split)
    model = run.model if run.sharded else run.worker.distribute(run.model)
    if run.settings.compile:
        model = torch.compile(model)  # type: ignore[assignment]
    while not run.stopped and run.epoch < (run.last or run.length or run.settings.epochs):
        # Draws of layers such as dropout follow from seed, epoch and rank.
        with seeded(run.seed, "dropout", run.epoch, run.worker.rank), modes():
            for hook in run.hooks:
                hook.on_epoch(run)
            with run.cost:
                metrics = train_epoch(run, model)
                for hook in run.hooks:
                    hook.on_epoch_end(run)
        run.epoch += 1
        if measure:
            metrics |= measure(run.model, run.epoch)
        bills = run.bills()
        row = {"phase": run.phase, "main": run.main, "model": run.label, "epoch": run.epoch, **metrics}
        run.rows.append({**row, "backward": sum(bill.backward for bill in bills)})
        state = run.state_dict(bills) if checkpoints and (is_first or run.sharded) else None
        if is_first:
            if checkpoints and state:
                checkpoints.save(run.epoch, state)
            run.worker.report({**run.rows[-1], "bill": bills[0].record()})
    return run


def train_epoch(run: Run, model: nn.Module) -> dict[str, float]:
    """Train one epoch; return its metrics over all workers."""
    settings = run.settings
    model.train()  # before hooks see the model: frozen layers stay in evaluation mode
    steps, batches = run.batches()
    if run.trace and run.epoch == 1:
        batches = traced(batches, run.worker.device, run.trace)
    totals = torch.zeros(3, dtype=torch.float64, device=run.worker.device)  # Σ w·loss, correct, samples
    norms = []  # of the gradients before clipping
    length = run.length or settings.epochs
    steps_left = whole_steps((run.last or length) - run.epoch, steps)
    reported = time.monotonic()
    for number, batch in enumerate(batches):
        if number == steps_left:  # training ends within this epoch
            break
        run.progress = (run.epoch + number / steps) / length
        rate = learning_rate(settings, run.progress)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        totals += train_step(run, model, batch)
        if settings.clip:
            norms.append(run.norm)
        if run.worker.rank == 0 and time.monotonic() - reported >= QUIET:
            reported = time.monotonic()
            row = {"phase": run.phase, "model": run.label, "epoch": run.epoch + 1}
            run.worker.report({**row, "within": number + 1, "steps": min(steps, steps_left)})
    loss, correct, samples = run.worker.sum(totals).tolist()
    if not math.isfinite(loss):
        kept = f"; the checkpoint of epoch {run.epoch} stays" if run.epoch else ""
        where = f"in epoch {run.epoch + 1} of phase {run.phase!r} (lr {settings.lr})"
        raise UserError(f"the loss became {loss} {where}: lower the learning rate{kept}")
    metrics = {"loss": loss / samples, "train_accuracy": correct / samples, "lr": rate}
    if settings.clip:
        norm = torch.stack(norms).double()
        metrics["gradient_norm"] = norm.mean().item()
        metrics["clipped"] = (norm > settings.clip).double().mean().item()
    return metrics


def training_flops(model: nn.Module, split: Split) -> float:
    """Return the operations of training per number of its input: those of the forward and of the backward pass.

    The gradients of the inputs cost a forward pass, those of trained weights another one (arXiv:2204.02311, appendix
    B). The numbers are those of a sample of the longest kind: shorter texts cost in proportion.

    >>> split = Split.from_tensors(torch.arange(12.0).view(6, 2), torch.arange(6) % 2)
    >>> training_flops(nn.Linear(2, 2), split)
    12.0
    """
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    counts = forward_flops(model, split.shape)
    total = sum(count * (2 if name in frozen else 3) for name, count in counts.items())
    return total / split.kind.example(1, split.shape).numel()


def traced(batches: Iterator[Batch], device: torch.device, store: Callable[[bytes], None]) -> Iterator[Batch]:
    """Yield batches; ``store`` receives PyTorch's trace of the first steps, a compressed file for Chrome's viewer."""
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (device.type == "cuda")]
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities) as trace:
            yield from islice(batches, TRACED)
        path = Path(folder, TRACE)
        trace.export_chrome_trace(str(path))
        store(path.read_bytes())
    yield from batches


def train_step(run: Run, model: nn.Module, batch: Batch) -> Tensor:
    """Take one step of the optimiser; return Σ w·loss, hits and samples of this worker's slice, float64 [3]."""
    settings = run.settings
    parts = batch.parts(settings.micro_batch)
    all_weighted, all_losses, all_hits = [], [], []
    for part in parts:
        # Only the last part's gradients are exchanged: those of all parts have added up by then.
        shares = run.worker.world == 1 or part is parts[-1]
        with nullcontext() if shares else model.no_sync():  # type: ignore[operator]  # a method of DDP
            with autocast(settings.precision, part.x.device):
                output = model(part.x)
            losses, hits = scored(output, part.y)
            weighted = losses @ part.weights  # Σ w·cross-entropy, recorded whatever is trained
            objective = weighted
            if run.loss:
                objective = own_losses(run.loss, output, part.y).to(weighted.dtype) @ part.weights
            elif settings.label_smoothing:
                objective = losses_of(output, part.y, settings.label_smoothing) @ part.weights
            # DDP averages over workers, so each worker's share of Σ w·loss / total is scaled by their number.
            (objective * (run.worker.world / part.total)).backward()
        all_weighted.append(weighted.detach())
        all_losses.append(losses.detach())
        all_hits.append(hits)
    weighted = all_weighted[0] if len(parts) == 1 else torch.stack(all_weighted).sum()
    hits = torch.cat(all_hits)
    run.batch = batch
    run.seen = Seen(batch.indices, torch.cat(all_losses), hits)
    for hook in run.hooks:
        hook.on_gradients(run)
    if settings.clip:
        run.norm = whole(clip_grad_norm_(run.model.parameters(), settings.clip))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    samples = len(batch.y)
    run.cost.forward += samples
    run.cost.backward += samples
    run.cost.operations += run.flops * batch.x.numel()
    if run.sharded:  # the gathering of the parameters for each pass
        run.cost.sent += sum(2 * parameter.nbytes // run.worker.world for parameter in run.model.parameters())
    if run.worker.world > 1:  # the sum of the gradients
        run.cost.sent += sum(parameter.nbytes for parameter in run.model.parameters() if parameter.requires_grad)
    for hook in run.hooks:
        hook.on_step(run)
    count = torch.tensor(samples, device=weighted.device)
    return torch.stack([weighted.double(), hits.sum().double(), count.double()])


def scored(output: Tensor | Answered, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [b] and hits [b] of samples: by logits [b, C] and labels, or those that a language model found."""
    if isinstance(output, Answered):
        return output.losses, output.right
    return losses_of(output, y), output.argmax(1) == y


def losses_of(logits: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the samples' cross-entropy [b], computed in at least 32 bits, from logits [b, C] and labels [b].

    ``smoothing`` is the share of each target that is spread over all classes.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, y, reduction="none", label_smoothing=smoothing)


def own_losses(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, y: Tensor) -> Tensor:
    """Return the samples' losses [b] by a user's function of logits [b, C], in at least 32 bits, and labels [b]."""
    losses = function(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)
    if not (isinstance(losses, Tensor) and losses.shape == y.shape and losses.requires_grad):
        came = described(losses) + " without a gradient" * (getattr(losses, "shape", None) == y.shape)
        raise UserError(f"train.loss must return a loss with a gradient for each of {len(y)} samples, not {came}")
    return losses


def output_of(model: nn.Module, x: Tensor, views: str) -> Any:
    """Return the model's output on x, or the mean logits of ``views`` of images [b, C, H, W] (arXiv:2404.00498).

    With m(x) the mean over x and its mirror image, ``mirrored`` is m(x), and ``shifted`` ½ m(x) + ¼ m(↖x) + ¼ m(↘x)
    with shifts by one pixel within a reflected border.
    """
    if views == "plain":
        return model(x)

    def mirrored(x: Tensor) -> Tensor:
        return (model(x).double() + model(x.flip(3))) / 2

    if views == "mirrored":
        return mirrored(x)
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return mirrored(x) / 2 + (mirrored(padded[:, :, 2:, 2:]) + mirrored(padded[:, :, :-2, :-2])) / 4


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context that computes matrix products in a precision; ``auto`` = bfloat16 if the hardware has it."""
    is_wanted = precision == "bfloat16" or (precision == "auto" and computes_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=is_wanted)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    split: Split,
    indices: Tensor | None = None,
    worker: Worker | None = None,
    cost: Cost | None = None,
    *,
    precision: str = "auto",
    views: str = "plain",
    metric: Callable[[Tensor, Tensor], Any] | None = None,
) -> dict[str, float]:
    """Return the mean loss and the accuracy of rank 0's model on the samples at ``indices``, int64 [n] (default: all).

    Of a language model the loss is per answered token, the accuracy is that of first answered tokens, and perplexity,
    e to the loss, is a third figure. Logits of images are averaged over ``views``: plain, mirrored or shifted. A
    ``metric`` of all logits float [n, C] and labels int64 [n], on the CPU, is a further figure.
    Each worker evaluates its slice; without one, this process does on its CPU. The model's mode is restored, and the
    forward passes are added to ``cost``.

    >>> split = Split.from_tensors(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    >>> model = nn.Linear(1, 2)
    >>> _ = model.weight.data.copy_(torch.tensor([[-9.0], [9.0]]))
    >>> evaluate(model, split)["accuracy"]
    1.0
    """
    indices = torch.arange(len(split)) if indices is None else indices
    worker = worker or Worker()
    cost = cost or Cost("evaluate")
    was_training = model.training
    mine = slice_of(indices, worker)
    left = len(mine)
    # A pass through shared parameters is one of all workers, and a model of texts may refuse a batch of none.
    if not left or any(hasattr(weight, "full_tensor") for weight in model.parameters()):
        mine = torch.cat([mine, indices[: -(-len(indices) // worker.world) - left]])
    totals = torch.zeros(2, dtype=torch.float64, device=worker.device)  # Σ loss, correct
    answers = False
    outputs = []
    with cost:
        worker.share(model.buffers())  # running statistics of batch norm drift apart
        model.eval()
        for x, y in plain_batches(split, mine, worker.device, dtype=dtype_of(model)):
            with autocast(precision, worker.device):
                output = output_of(model, x, views)
            answers = isinstance(output, Answered)
            losses, hits = (scores[:left] for scores in scored(output, y))
            if metric:
                outputs.append(output[:left].float().cpu())
            left = max(0, left - len(y))
            totals += torch.stack([losses.sum().double(), hits.sum().double()])
        model.train(was_training)
        mean_loss, accuracy = (worker.sum(totals) / max(1, len(indices))).tolist()
    cost.forward += len(mine) * VIEWS[views]
    metrics = {"loss": mean_loss, "accuracy": accuracy}
    if metric:  # slices are consecutive, in the order of ranks
        logits = torch.cat([part for parts in worker.gather(outputs) for part in parts])
        value = metric(logits, split.y[indices])
        metrics["metric"] = math.nan
        with suppress(TypeError, ValueError, RuntimeError):
            metrics["metric"] = float(value)
        if not math.isfinite(metrics["metric"]):
            raise UserError(f"train.metric must return a finite number, not {shown(value)}")
    return metrics | {"perplexity": math.exp(min(mean_loss, MOST_NATS))} if answers else metrics
