"""A run: everything that training consists of and that a checkpoint holds; its hooks and its optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import unwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from raypkg.core.config import validate
from raypkg.core.errors import UserError, unknown
from raypkg.core.settings import Training
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.models.operations import checkpoint_blocks

from . import hook as hook  # the registry
from .batches import Batch, Batches, Epoch, dtype_of
from .worker import Buffers, Cost, Worker, share_of, whole

if TYPE_CHECKING:
    import pyarrow as pa


class Seen(NamedTuple):
    """The samples of one step on this worker, as the model saw them."""

    indices: Tensor  # [b], positions in the split
    losses: Tensor  # [b], plain cross-entropy without weights, whatever is trained
    right: Tensor  # [b], True where the model was right


class Selected(NamedTuple):
    """A coreset that a hook selected during training."""

    coreset: Coreset  # positions in the split, with weights
    origin: Mapping[str, Any]  # how it was made, as plain values
    indices: Tensor  # int64 [n], the samples it was selected from
    scores: Tensor | None = None  # float32 [n], their gradient norms, if known


class Results(NamedTuple):
    """The results of a hook, stored in the run folder."""

    facts: Mapping[str, Any] = {}  # plain values for the manifest
    findings: Sequence[str] = ()  # lines for the user
    tables: Mapping[str, pa.Table] = {}  # by file name
    plots: Mapping[str, Callable[[Path], None]] = {}  # by file name, functions that draw a picture to a path
    selected: Selected | None = None  # the coreset of the run


class Hook:
    """The base of all hooks: does nothing; a method overrides what it needs. Its state travels with checkpoints.

    >>> import torch
    >>> from raypkg import Run, Split, fit
    >>> class Clip(Hook):
    ...     def on_gradients(self, run):
    ...         torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    >>> split = Split.from_tensors(torch.arange(12.0).view(6, 2), torch.arange(6) % 2)
    >>> fit(Run.simple(torch.nn.Linear(2, 2), split, hooks=[Clip()], epochs=1)).epoch
    1
    """

    # Hooks act in ascending priority, equal ones as they are listed: readers of the raw gradient first (0), its
    # corrections next (10), a user's own hooks then (50), and last those that keep pruned weights at zero (100).
    priority: ClassVar[int] = 50
    supplies_batches: ClassVar[bool] = False  # True if ``batches`` is overridden; at most one hook of a run does so
    sharded: ClassVar[bool] = False  # True if it works where the workers share the model's parameters (FSDP2)

    def __init_subclass__(cls) -> None:
        cls.supplies_batches = cls.batches is not Hook.batches
        points = [name for name in vars(Hook) if name.startswith("on_")]
        if wrong := next((name for name in vars(cls) if name.startswith("on_") and name not in points), None):
            raise unknown(f"point of the training loop in the hook {cls.__name__}:", wrong, points)

    def on_start(self, run: Run) -> None:
        """Act before training, and before a checkpoint is restored; may change the first weights."""

    def on_epoch(self, run: Run) -> None:
        """Act before an epoch; may replace ``run.coreset``; records its own work with ``run.bill(name)``."""

    def batches(self, run: Run) -> Epoch | None:
        """Return the batches of the next epoch, or None to shuffle the coreset."""
        return None

    def on_gradients(self, run: Run) -> None:
        """Act after the backward pass of ``run.batch``, before gradients are clipped; may edit ``.grad`` in place."""

    def on_step(self, run: Run) -> None:
        """Act after the optimiser's step."""

    def on_epoch_end(self, run: Run) -> None:
        """Act after an epoch's last step, before its checkpoint."""

    def results(self, run: Run) -> Results:
        """Return the results of a finished training; called on rank 0 only."""
        return Results()

    def close(self) -> None:
        """Release files and processes, however training ended."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load_state_dict`` restores."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's state."""


@dataclass
class Run:
    """One training: model, data, optimiser, hooks and progress."""

    model: nn.Module
    split: Split
    coreset: Coreset
    settings: Training
    seed: int
    phase: str  # name in the metrics and on the bill
    worker: Worker
    augment: Sequence[str]
    cost: Cost
    hooks: Sequence[Hook] = ()  # in the order in which they act
    length: float | None = None  # epochs of the schedule, if not whole
    last: float | None = None  # epochs to train, if fewer than the schedule's
    sharded: bool = False  # whether the workers share the parameters (FSDP2), instead of a copy each (DDP)
    label: int | None = None  # number of this model in the metrics, where a phase trains several
    main: bool = True  # False for a training that prepares the run's main one
    loss: Callable[[Tensor, Tensor], Tensor] | None = None  # trained instead of the cross-entropy, [b, C] and [b] → [b]
    stopped: bool = False  # ends training after the epoch; hooks may set it, alike on all workers
    trace: Callable[[bytes], None] | None = None  # stores the trace of the second epoch's first steps
    epoch: int = 0
    step: int = 0
    progress: float = 0.0  # share of the schedule that is done
    flops: float = 0.0  # operations of training per number of a batch's input; 0 where the device's peak is unknown
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics, one for each epoch
    optimizer: torch.optim.Optimizer = field(init=False)
    batch: Batch = field(init=False)  # of the current step
    seen: Seen = field(init=False)  # in the current step
    norm: Tensor = field(init=False)  # of the current step's gradients before clipping, if ``clip`` is set

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.settings.precision == "float64" else torch.float32
        self.model.to(self.worker.device, dtype).to(memory_format=torch.channels_last)
        if self.settings.checkpointing:
            checkpoint_blocks(self.model)
        self.optimizer = build_optimizer(self.model, self.settings)
        self._buffers = Buffers()
        self._bills = {self.phase: self.cost, "evaluate": Cost("evaluate")}
        self._earlier: dict[str, Cost] = {}  # bills of attempts before the last restart

    @classmethod
    def simple(
        cls,
        model: nn.Module,
        split: Split,
        settings: Training | None = None,
        *,
        hooks: Sequence[Hook] = (),
        coreset: Coreset | None = None,
        seed: int = 0,
        augment: Sequence[str] | None = None,
        worker: Worker | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        **training: Any,
    ) -> Run:
        """Return a training of ``model`` in place, in this process, for ``fit``.

        Settings are given as an object or by name, such as ``epochs=10, lr=0.1``. By default it trains on all samples
        of the split, with the augmentations that suit the data, on the CPU. ``loss`` maps logits [b, C] and labels [b]
        to the samples' losses [b] (default: cross-entropy).

        Raises:
            UserError: an unknown setting, an invalid value, settings given in both ways, or no Split.

        >>> from raypkg.engine.loop import fit
        >>> x = torch.arange(12.0).view(6, 2)
        >>> run = Run.simple(nn.Linear(2, 2), Split.from_tensors(x, torch.arange(6) % 2), epochs=2, batch_size=3)
        >>> fit(run).step
        4
        """
        if settings is not None and training:
            raise UserError(f"settings are given, so {min(training)} would do nothing: change it in them")
        if not isinstance(split, Split):
            raise UserError(f"a {type(split).__name__} is no Split, such as load_data(…).train")
        return cls(
            model=model,
            split=split,
            coreset=Coreset.uniform(torch.arange(len(split))) if coreset is None else coreset,
            settings=validate(Training, training) if settings is None else settings,
            seed=seed,
            phase="train",
            worker=worker or Worker(),
            augment=split.augment if augment is None else augment,
            cost=Cost("train"),
            hooks=hooks,
            loss=loss,
        )

    def batches(self) -> Epoch:
        """Return the batches of the next epoch: a hook's, or the shuffled coreset, which a hook may have replaced."""
        for supplier in self.hooks:
            epoch = supplier.batches(self)
            if epoch is not None:
                return epoch
        check_weights(self.coreset, "the coreset")
        local = self.split.local  # None unless the samples are read by blocks
        if local is not None and not torch.isin(self.coreset.indices, local).all():
            problem = "a hook set run.coreset to samples outside the given coreset, the only ones on this machine"
            raise UserError(f"{problem}: omit dataset.streamed")
        shuffled = Batches(
            self.split, self.coreset, self.settings.batch_size, seed=self.seed, augment=self.augment,
            worker=self.worker, dtype=dtype_of(self.model), empty=self._buffers.empty,
        )  # fmt: skip
        return Epoch(len(shuffled), shuffled.epoch(self.epoch))

    def bill(self, name: str) -> Cost:
        """Return this worker's bill for work other than training itself."""
        return self._bills.setdefault(name, Cost(name))

    def bills(self) -> list[Cost]:
        """Return the cost of each part of the run so far, over all workers (a collective) and all attempts."""
        everyone = self.worker.gather(self._bills)
        bills = []
        for name in dict.fromkeys(name for each in everyone for name in each):
            joint = Cost.joined(name, [each[name] for each in everyone if name in each])
            bills.append(self._earlier.get(name, Cost(name)).then(joint))
        return bills

    def state_dict(self, bills: Sequence[Cost]) -> dict[str, Any]:
        """Return everything that the rest of training depends on, as tensors and plain values.

        It does not depend on ``sharded``, which makes it a collective.
        """
        return {
            "model": whole(self.model.state_dict()),
            "optimizer": whole(self.optimizer.state_dict()),
            "hooks": [hook.state_dict() for hook in self.hooks],
            "coreset": {"indices": self.coreset.indices, "weights": self.coreset.weights},
            "epoch": self.epoch,
            "step": self.step,
            "stopped": self.stopped,
            "rows": list(self.rows),
            "bills": [bill.record() for bill in bills],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume as if training had never stopped."""
        own = self.model.state_dict()
        shared = {name: share_of(own.get(name, value), value) for name, value in state["model"].items()}
        self.model.load_state_dict(shared)
        stored = zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
        groups = [{**group, "fused": mine["fused"]} for group, mine in stored]  # which depends on ``sharded``
        self.optimizer.load_state_dict({**state["optimizer"], "param_groups": groups})
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if value is not None and value.shape == parameter.shape:  # no count of steps
                    kept[name] = share_of(parameter, value)
        for each, hook_state in zip(self.hooks, state["hooks"], strict=True):
            each.load_state_dict(hook_state)
        self.coreset = Coreset(**state["coreset"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.stopped = state.get("stopped", False)  # of an earlier version's checkpoint
        self.rows = list(state["rows"])
        self._earlier = {bill["phase"]: Cost(**bill) for bill in state["bills"]}
        self.cost = Cost(self.phase)
        self._bills = {name: Cost(name) for name in self._earlier}
        self._bills[self.phase] = self.cost


def check_weights(coreset: Coreset, name: str) -> None:
    """Refuse a coreset whose weights are all 0; ``name`` stands for it in the error."""
    if len(coreset) and not coreset.weights.any():
        raise UserError(f"all {len(coreset)} weights of {name} are 0: nothing would be trained")


# The optimiser


class Eager(torch.optim.Optimizer):
    """An optimiser without PyTorch's compiler.

    The first call of a method that PyTorch excludes from compilation imports the compiler, which takes as long as
    importing PyTorch. effray never compiles optimisers, so it calls the methods beneath those wrappers.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class SGD(Eager, torch.optim.SGD):
    """Stochastic gradient descent."""

    step = torch.no_grad()(unwrap(torch.optim.SGD.step))


class AdamW(Eager, torch.optim.AdamW):
    """Adam with decoupled weight decay."""

    step = torch.no_grad()(unwrap(torch.optim.AdamW.step))


def build_optimizer(model: nn.Module, settings: Training) -> torch.optim.Optimizer:
    """Build the optimiser of the settings, with fused multi-tensor updates; refuse a model without free parameters."""
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        raise UserError("all parameters of the model are frozen (requires_grad = False): there is nothing to train")
    groups: list[dict] = [{"params": parameters}]
    if settings.decay == "matrices":  # neither norms nor biases decay
        matrices = [parameter for parameter in parameters if parameter.dim() > 1]
        others = [parameter for parameter in parameters if parameter.dim() < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    momentum, decay = settings.momentum, settings.weight_decay
    if settings.optimizer == "adamw":
        return AdamW(groups, settings.lr, betas=(momentum, 0.999), weight_decay=decay, fused=True)
    nesterov = settings.nesterov and momentum > 0
    fused = not hasattr(parameters[0], "full_tensor")  # PyTorch has no fused SGD of shared parameters
    return SGD(groups, settings.lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, fused=fused)


# Shapes of the learning rate, as functions of the share t of training that is done.
SHAPES: dict[str, Callable[[float, Training], float]] = {
    "cosine": lambda t, settings: 0.5 * (1 + math.cos(math.pi * t)),
    "linear": lambda t, settings: min(1.0, (1 - t) / (1 - settings.warmup)),  # falls from the end of the warm-up
    "multistep": lambda t, settings: settings.lr_drop ** sum(t >= milestone for milestone in settings.milestones),
    "constant": lambda t, settings: 1.0,
}


def learning_rate(settings: Training, t: float) -> float:
    """Return the learning rate after the share ``t`` of training, 0 ≤ t < 1.

    The rate rises linearly over the warm-up share of training, and the shape of the schedule multiplies it.

    >>> learning_rate(Training(lr=0.2, schedule="multistep", milestones=[0.5]), 0.6)
    0.020000000000000004
    """
    rise = min(1.0, (t + 1e-3) / settings.warmup) if settings.warmup else 1.0
    return settings.lr * rise * SHAPES[settings.schedule](t, settings)
