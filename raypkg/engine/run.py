"""A run: everything that training consists of and that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raypkg.core.config import validate
from raypkg.core.errors import UserError
from raypkg.core.settings import Training
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split
from raypkg.models.checkpointing import checkpoint_blocks

from .batches import Batch, Batches, Epoch, dtype_of
from .costs import Cost
from .hooks import Hook
from .optimizer import build_optimizer
from .worker import Buffers, Worker, share_of, whole


class Seen(NamedTuple):
    """The samples of one step on this worker, as the model saw them."""

    indices: Tensor  # [b], positions in the split
    losses: Tensor  # [b], plain cross-entropy without weights, whatever is trained
    right: Tensor  # [b], True where the model was right


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
        coreset = self.coreset
        last = int(coreset.indices.max()) if len(coreset) else 0
        if last >= len(self.split):
            raise UserError(f"the coreset has index {last}, these samples end at {len(self.split) - 1}")
        check_weights(coreset, "the coreset")
        local = self.split.local  # None unless the samples are read by blocks
        if local is not None and not torch.isin(coreset.indices, local).all():
            raise UserError(
                "a hook set run.coreset to samples outside the given coreset, the only ones copied to this machine:"
                " omit dataset.streamed"
            )
        size, dtype = self.settings.batch_size, dtype_of(self.model)
        shuffled = Batches(
            self.split, coreset, size,
            seed=self.seed, augment=self.augment, worker=self.worker, dtype=dtype, empty=self._buffers.empty,
        )  # fmt: skip
        return Epoch(len(shuffled), shuffled.epoch(self.epoch))

    def bill(self, name: str) -> Cost:
        """Return this worker's bill for work other than training itself; every worker must open the same bills."""
        return self._bills.setdefault(name, Cost(name))

    def bills(self) -> list[Cost]:
        """Return the cost of each part of the run so far, over all workers (a collective) and all attempts."""
        names = self.worker.gather(list(self._bills))
        if any(others != names[0] for others in names):  # gathering the bills would wait forever
            raise UserError(f"a hook opened a bill on some workers only: they have {names}")
        bills = []
        for name, mine in self._bills.items():
            earlier = self._earlier.get(name, Cost(name))
            bills.append(earlier.then(mine.gathered(self.worker)))
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
        for hook, hook_state in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(hook_state)
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
