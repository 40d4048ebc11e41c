"""The one training loop: every method of the product is a coreset, a hook, or both, on this."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raypkg.core.errors import UserError
from raypkg.core.seeds import seeded
from raypkg.core.settings import Training
from raypkg.data.split import Split
from raypkg.methods.coreset import Coreset

from .batches import Batch, Batches, Epoch, dtype_of, plain_batches, slice_of
from .costs import Cost
from .hooks import Hook
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


class Seen(NamedTuple):
    """What one step saw of this worker's samples: positions in the split, losses without weights, and hits, [b]."""

    indices: Tensor
    losses: Tensor
    right: Tensor


@dataclass
class Run:
    """All that training consists of and that a checkpoint holds."""

    model: nn.Module
    split: Split
    coreset: Coreset
    settings: Training
    seed: int
    phase: str
    worker: Worker
    augment: Sequence[str]
    cost: Cost
    hooks: Sequence[Hook] = ()
    last: int | None = None  # epoch to stop after, where it is not the schedule's last
    label: int | None = None  # which of several models this is, in the metrics
    epoch: int = 0
    step: int = 0
    progress: float = 0.0  # share of the schedule that is done
    optimizer: torch.optim.Optimizer = field(init=False)
    batch: Batch = field(init=False)
    seen: Seen = field(init=False)

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.settings.precision == "float64" else torch.float32
        self.model.to(self.worker.device, dtype).to(memory_format=torch.channels_last)
        self.optimizer = optimizer(self.model, self.settings)
        self._bills = {self.phase: self.cost, "evaluate": Cost("evaluate")}
        self._earlier: dict[str, Cost] = {}  # of attempts before the last restart

    def batches(self) -> Epoch:
        """Return the batches of the coming epoch: a hook's, or the shuffled coreset."""
        for hook in self.hooks:
            if (epoch := hook.batches(self)) is not None:
                return epoch
        batches = Batches(
            self.split,
            self.coreset,
            self.settings.batch_size,
            seed=self.seed,
            augment=self.augment,
            worker=self.worker,
            dtype=dtype_of(self.model),
        )
        return Epoch(len(batches), batches.epoch(self.epoch))

    def bill(self, name: str) -> Cost:
        """Return this worker's bill for a part of the run that is not training itself; every worker opens the same."""
        return self._bills.setdefault(name, Cost(name))

    def bills(self) -> list[Cost]:
        """Return what each part of the run cost so far, over all workers (a collective) and all attempts."""
        now = {name: bill.gathered(self.worker) for name, bill in self._bills.items()}
        return [self._earlier.get(name, Cost(name)).then(bill) for name, bill in now.items()]

    def state_dict(self, bills: Sequence[Cost]) -> dict[str, Any]:
        """Return everything that the rest of training depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hooks": [hook.state_dict() for hook in self.hooks],
            "coreset": {"indices": self.coreset.indices, "weights": self.coreset.weights},
            "epoch": self.epoch,
            "step": self.step,
            "bills": [bill.record() for bill in bills],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as if training had never stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for hook, hook_state in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(hook_state)
        self.coreset = Coreset(**state["coreset"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._earlier = {bill["phase"]: Cost(**bill) for bill in state["bills"]}
        self.cost = Cost(self.phase)
        self._bills = {name: Cost(name) for name in self._earlier} | {self.phase: self.cost}


def fit(
    run: Run,
    *,
    checkpoints: Checkpoints | None = None,
    measure: Callable[[nn.Module, int], dict[str, float]] | None = None,
) -> Run:
    """Train to the run's last epoch, going on from the newest checkpoint if there is one.

    Args:
        run: what to train; its model holds the result.
        checkpoints: where state is kept after each epoch.
        measure: computes further metrics of the model after each epoch, given its number.

    Raises:
        UserError: the loss of an epoch is not finite; the last good checkpoint stays.
    """
    checkpoints = checkpoints or Forgetful()
    with seeded(run.seed, "start"):
        for hook in run.hooks:
            hook.on_start(run)
    if state := checkpoints.load():
        run.load_state_dict(state)
    model = _prepared(run)
    while run.epoch < (run.last or run.settings.epochs):
        with seeded(run.seed, "dropout", run.epoch, run.worker.rank):
            for hook in run.hooks:
                hook.on_epoch(run)
            with run.cost:
                row = _train_epoch(run, model)
                for hook in run.hooks:
                    hook.on_epoch_end(run)
        run.epoch += 1
        if measure:
            row |= measure(run.model, run.epoch)
        bills = run.bills()
        if run.worker.rank == 0:
            checkpoints.save(run.epoch, run.state_dict(bills))
            spent = {"backward": sum(bill.backward for bill in bills)}
            run.worker.report({"phase": run.phase, "model": run.label, "epoch": run.epoch, **row, **spent})
    return run


def _prepared(run: Run) -> nn.Module:
    model = run.worker.distribute(run.model)
    return torch.compile(model) if run.settings.compile else model  # type: ignore[return-value]


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
        stays = f"; the checkpoint of epoch {run.epoch} stays" if run.epoch else ""
        raise UserError(
            f"the loss became {loss} in epoch {run.epoch + 1} of phase {run.phase!r}"
            f" (lr {run.settings.lr}): lower the learning rate{stays}"
        )
    return {"loss": loss / samples, "train_accuracy": correct / samples, "lr": rate}


def _train_step(run: Run, model: nn.Module, batch: Batch, world: int) -> Tensor:
    with autocast(run.settings.precision, batch.x.device):
        logits = model(batch.x)
    losses = losses_of(logits, batch.y)
    objective = losses @ batch.weights  # Σ w·loss
    run.batch, run.seen = batch, Seen(batch.indices, losses.detach(), logits.detach().argmax(1) == batch.y)
    # DDP averages over workers, so each one's share of Σ w·loss / total is scaled up by their number.
    (objective * (world / batch.total)).backward()
    for hook in run.hooks:
        hook.on_gradients(run)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.cost.forward += len(batch.y)
    run.cost.backward += len(batch.y)
    if world > 1:
        run.cost.sent += sum(p.numel() * p.element_size() for p in run.model.parameters())
    for hook in run.hooks:
        hook.on_step(run)
    count = torch.tensor(len(batch.y), device=losses.device)
    return torch.stack([objective.detach().double(), run.seen.right.sum().double(), count.double()])


def losses_of(logits: Tensor, y: Tensor) -> Tensor:
    """Return the samples' cross-entropy, computed in at least 32 bits, [b]."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y, reduction="none")


def optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Build the optimiser of the settings, with fused multi-tensor updates."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(
            model.parameters(),
            settings.lr,
            betas=(settings.momentum, 0.999),
            weight_decay=settings.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        model.parameters(),
        settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov and settings.momentum > 0,
        weight_decay=settings.weight_decay,
        fused=True,
    )


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
    indices: Tensor,
    worker: Worker,
    cost: Cost,
    *,
    precision: str = "auto",
) -> dict[str, float]:
    """Return mean loss and accuracy over the indices of rank 0's model, every worker taking its slice of them."""
    was_training, mine = model.training, slice_of(indices, worker)
    totals = torch.zeros(2, dtype=torch.float64, device=worker.device)
    with cost:
        worker.share(model.buffers())
        model.eval()
        for x, y in plain_batches(split, mine, worker.device, dtype=dtype_of(model)):
            with autocast(precision, worker.device):
                logits = model(x)
            totals += torch.stack([losses_of(logits, y).sum().double(), (logits.argmax(1) == y).sum().double()])
        model.train(was_training)
        loss, correct = (worker.sum(totals) / max(1, len(indices))).tolist()
    cost.forward += len(mine)
    return {"loss": loss, "accuracy": correct}
