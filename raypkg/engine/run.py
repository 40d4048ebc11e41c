"""What training consists of: the run and its state, and what a hook may do to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from raypkg.core.config import validate
from raypkg.core.errors import UserError
from raypkg.core.settings import Training
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split

from . import hook as hook
from .batches import Batch, Batches, Epoch, dtype_of
from .costs import Cost
from .optimizer import optimizer
from .worker import Worker

if TYPE_CHECKING:
    import pyarrow as pa


class Seen(NamedTuple):
    """What one step saw of this worker's samples: positions in the split, losses without weights, and hits, [b]."""

    indices: Tensor
    losses: Tensor
    right: Tensor


@dataclass
class Run:
    """All that training consists of and that a checkpoint holds.

    Attributes:
        phase: names the rows of metrics and the bill.
        hooks: act in this order.
        last: the epoch to stop after, where it is not the schedule's last.
        label: which of several models this is, in the metrics.
        main: whether this is the run's main training, not one that prepares it.
        progress: share of the schedule that is done.
        rows: of metrics, one for each epoch so far.
        batch: of the present step.
        seen: by the present step; its losses are plain cross-entropy, whatever is trained.
        norm: of all gradients of the present step before they are clipped, where ``clip`` is set.
    """

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
    last: int | None = None
    label: int | None = None
    main: bool = True
    epoch: int = 0
    step: int = 0
    progress: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    optimizer: torch.optim.Optimizer = field(init=False)
    batch: Batch = field(init=False)
    seen: Seen = field(init=False)
    norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        dtype = torch.float64 if self.settings.precision == "float64" else torch.float32
        self.model.to(self.worker.device, dtype).to(memory_format=torch.channels_last)
        self.optimizer = optimizer(self.model, self.settings)
        self._bills = {self.phase: self.cost, "evaluate": Cost("evaluate")}
        self._earlier: dict[str, Cost] = {}  # of attempts before the last restart

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
        **training: Any,
    ) -> Run:
        """Return a training in this process, for ``fit``.

        Args:
            model: ``head(features(x))``, trained in place.
            split: the samples.
            settings: of the training; None = the defaults, with what is given by name instead.
            hooks: act in this order.
            coreset: to train on; None = all samples.
            seed: names every draw.
            augment: names of augmentations; None = those that suit the data.
            worker: where to train; None = on the CPU.
            **training: settings by their names, such as ``epochs=10, lr=0.1``.

        Raises:
            UserError: an unknown setting, a value that it does not allow, settings in both ways, or no Split.

        >>> from raypkg.data.split import Split
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
        )

    def batches(self) -> Epoch:
        """Return the batches of the coming epoch: a hook's, or the shuffled coreset.

        Raises:
            UserError: a hook gave something else, or a coreset that cannot be trained on.
        """
        for supplier in self.hooks:
            epoch = supplier.batches(self)
            if epoch is not None:
                return _checked_epoch(epoch, supplier)
        self._check_coreset()
        shuffled = Batches(
            self.split,
            self.coreset,
            self.settings.batch_size,
            seed=self.seed,
            augment=self.augment,
            worker=self.worker,
            dtype=dtype_of(self.model),
        )
        return Epoch(len(shuffled), shuffled.epoch(self.epoch))

    def _check_coreset(self) -> None:
        """Refuse what a hook or a method put in the place of the coreset and cannot be trained on."""
        coreset = self.coreset
        if not isinstance(coreset, Coreset):
            raise UserError(f"a hook set run.coreset to a {type(coreset).__name__}: it must be a raypkg.Coreset")
        last = int(coreset.indices.max()) if len(coreset) else 0
        if last >= len(self.split):
            raise UserError(f"the coreset has index {last}, these samples end at {len(self.split) - 1}")
        local = self.split.local
        if local is not None and not torch.isin(coreset.indices, local).all():
            raise UserError(
                "a hook set run.coreset to samples that are not in the given coreset, which alone is copied to this"
                " machine: leave out dataset.streamed"
            )
        check_weights(coreset, "the coreset")

    def bill(self, name: str) -> Cost:
        """Return this worker's bill for a part of the run that is not training itself; every worker opens the same."""
        return self._bills.setdefault(name, Cost(name))

    def bills(self) -> list[Cost]:
        """Return what each part of the run cost so far, over all workers (a collective) and all attempts."""
        names = self.worker.gather(list(self._bills))
        if any(others != names[0] for others in names):  # gathering bills one by one would wait for ever
            raise UserError(f"a hook opened a bill on some workers only: they have {names}")
        bills = []
        for name, mine in self._bills.items():
            earlier = self._earlier.get(name, Cost(name))
            bills.append(earlier.then(mine.gathered(self.worker)))
        return bills

    def state_dict(self, bills: Sequence[Cost]) -> dict[str, Any]:
        """Return everything that the rest of training depends on, as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "hooks": [_checked_state(hook) for hook in self.hooks],
            "coreset": {"indices": self.coreset.indices, "weights": self.coreset.weights},
            "epoch": self.epoch,
            "step": self.step,
            "rows": list(self.rows),
            "bills": [bill.record() for bill in bills],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as if training had never stopped."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for restored, hook_state in zip(self.hooks, state["hooks"], strict=True):
            restored.load_state_dict(hook_state)
        self.coreset = Coreset(**state["coreset"])
        self.epoch = state["epoch"]
        self.step = state["step"]
        self.rows = list(state["rows"])
        self._earlier = {bill["phase"]: Cost(**bill) for bill in state["bills"]}
        self.cost = Cost(self.phase)
        self._bills = {name: Cost(name) for name in self._earlier}
        self._bills[self.phase] = self.cost


class Selected(NamedTuple):
    """The samples that a hook chose to train on.

    Attributes:
        coreset: positions in the split, with weights.
        origin: how it was made, as plain values.
        indices: the samples that took part, int64 [n].
        scores: their gradient norms, float32 [n]; None where there are none.
    """

    coreset: Coreset
    origin: Mapping[str, Any]
    indices: Tensor
    scores: Tensor | None = None


class Results(NamedTuple):
    """What a hook leaves behind in the run folder.

    Attributes:
        facts: figures for the manifest, as plain values.
        findings: what to tell the user, a line each.
        tables: by the name of their files.
        plots: by the name of their files, functions that draw a picture to a path.
        selected: the coreset of the run.
    """

    facts: Mapping[str, Any] = {}
    findings: Sequence[str] = ()
    tables: Mapping[str, pa.Table] = {}
    plots: Mapping[str, Callable[[Path], None]] = {}
    selected: Selected | None = None


class Hook:
    """Does nothing at any point of the loop; a method overrides what it needs. Its state travels with checkpoints.

    Attributes:
        order: hooks act in ascending order, equal ones as they are listed. What reads the raw gradient comes first (0),
            what corrects it next (10), then a user's own (50), and at last what keeps pruned weights at zero (100).
        supplies_batches: whether ``batches`` replaces the shuffled coreset; at most one hook of a run does.

    >>> from raypkg.engine.loop import fit
    >>> class Clip(Hook):
    ...     def on_gradients(self, run):
    ...         nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    >>> split = Split.from_tensors(torch.arange(12.0).view(6, 2), torch.arange(6) % 2)
    >>> fit(Run.simple(nn.Linear(2, 2), split, hooks=[Clip()], epochs=1)).epoch
    1
    """

    order: ClassVar[int] = 50
    supplies_batches: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        cls.supplies_batches = cls.batches is not Hook.batches

    def on_start(self, run: Run) -> None:
        """Before training, and before a checkpoint is restored: may change the first weights."""

    def on_epoch(self, run: Run) -> None:
        """Before an epoch; may replace ``run.coreset``; its work goes on a bill of its own, ``run.bill(name)``."""

    def batches(self, run: Run) -> Epoch | None:
        """Return the batches of the coming epoch, if this hook chooses them; otherwise the coreset is shuffled."""
        return None

    def on_gradients(self, run: Run) -> None:
        """After the backward pass of ``run.batch``, before gradients are clipped; may edit ``.grad`` in place."""

    def on_step(self, run: Run) -> None:
        """After the optimiser's step."""

    def on_epoch_end(self, run: Run) -> None:
        """After an epoch's last step, before its checkpoint."""

    def results(self, run: Run) -> Results:
        """Return what is to be kept of a finished training; only the worker of rank 0 is asked."""
        return Results()

    def close(self) -> None:
        """Release files and processes, however training ended."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that ``load_state_dict`` restores."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a checkpoint's state."""


def check_weights(coreset: Coreset, what: str) -> None:
    """Refuse a coreset by which nothing would be trained.

    Args:
        coreset: to train on.
        what: names it in the error.

    Raises:
        UserError: all its weights are 0.
    """
    if len(coreset) and not coreset.weights.any():
        raise UserError(f"all {len(coreset)} weights of {what} are 0: nothing would be trained")


def _checked_epoch(epoch: object, hook: Hook) -> Epoch:
    kind = type(hook).__name__
    if not isinstance(epoch, Epoch):
        raise UserError(f"hook {kind}: batches() returned a {type(epoch).__name__}, not raypkg.engine.batches.Epoch")
    if epoch.steps < 1:
        raise UserError(f"hook {kind}: batches() returned an epoch of {epoch.steps} steps: at least 1")
    return epoch


def _checked_state(hook: Hook) -> dict[str, Any]:
    state = hook.state_dict()
    if not isinstance(state, dict):
        raise UserError(f"hook {type(hook).__name__}: state_dict() returned a {type(state).__name__}, not a dict")
    return state
