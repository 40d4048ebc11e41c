"""Samples as rules see them without a forward pass: the record that training keeps, and its hook; and rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.memory import check_memory
from raypkg.engine.run import Hook, Run, Seen

AT_ONCE = 1 << 20  # numbers of rows converted to float32 together


@dataclass(frozen=True, eq=False)
class Record:
    """Each sample's latest training loss, how often it was forgotten, and the area under its margin.

    The margin of a step is the log-odds of the label, ln p_y / (1 − p_y) = z_y − ln Σ_{c≠y} exp z_c: the logit of the
    label above those of all other classes together. It follows from the loss ℓ = −ln p_y, which training has anyway.

    Differs from the paper (arXiv:2001.10528): its margin is to the largest other logit, which is up to ln (C − 1)
    above this one; and no margin exceeds about 16, where a loss in float32 is 0.

    Raises:
        UserError: shapes do not fit, or a number is NaN.
    """

    y: Tensor  # labels, int64 [n]
    losses: Tensor  # cross-entropy at the sample's latest step, float32 [n]; +inf if it was never trained on
    # how often a sample classified rightly was classified wrongly the next time, float32 [n]; +inf if it was never
    # classified rightly; None if hits were not recorded
    forgotten: Tensor | None = None
    # mean margin over the epochs that the sample was trained in (area under the margin), float32 [n]; +inf if it was
    # never trained on; None if not recorded
    margins: Tensor | None = None

    def __post_init__(self):
        for name, values in (("losses", self.losses), ("forgotten", self.forgotten), ("margins", self.margins)):
            if values is not None and (values.shape != self.y.shape or values.isnan().any()):
                shape = list(values.shape)
                raise UserError(f"record of {len(self.y)} samples: {name} {shape} must be [n] without NaN")

    @classmethod
    def empty(cls, y: Tensor) -> Record:
        """Return the record of samples that no training has seen."""
        return cls(y, torch.full(y.shape, torch.inf))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, indices: Tensor | slice) -> Record:
        forgotten = None if self.forgotten is None else self.forgotten[indices]
        margins = None if self.margins is None else self.margins[indices]
        return Record(self.y[indices], self.losses[indices], forgotten, margins)


def margins_of(losses: Tensor) -> Tensor:
    """Return the margin ln p_y / (1 − p_y) of each loss −ln p_y, a loss of 0 as the least above 0 in float32."""
    exact = losses.double().clamp(min=torch.finfo(torch.float32).eps)
    others = -torch.expm1(-exact)  # 1 − p_y
    return (-exact - others.log()).float()


class Recorder(Hook):
    """Gathers every step's losses and hits at the end of an epoch, over all workers with one all-reduce."""

    priority = 0
    sharded = True
    _parts = ("losses", "right", "learned", "forgotten", "epochs", "total_margin")  # of the record, in checkpoints

    def __init__(self, y: Tensor):
        self.y = y
        self.losses = torch.full(y.shape, torch.inf)
        self.right = torch.zeros(len(y), dtype=torch.bool)  # classified rightly, the latest time
        self.learned = torch.zeros(len(y), dtype=torch.bool)  # and at any time
        self.forgotten = torch.zeros(len(y))  # times
        self.epochs = torch.zeros(len(y))  # in which it was trained on
        self.total_margin = torch.zeros(len(y))  # Σ of the mean margin in each of them
        self._steps: list[Seen] = []

    @property
    def record(self) -> Record:
        """The record up to the last complete epoch."""
        forgotten = self.forgotten.where(self.learned, torch.inf)
        mean = self.total_margin / self.epochs.clamp(min=1)
        margins = mean.where(self.epochs > 0, torch.inf)
        return Record(self.y, self.losses, forgotten, margins)

    def on_step(self, run: Run) -> None:
        """Keep the step's tensors where they are: no transfer, no wait."""
        self._steps.append(run.seen)

    def on_epoch_end(self, run: Run) -> None:
        """Record an epoch: for a sample seen several times, the mean loss, and whether it was right every time."""
        indices = torch.cat([step.indices for step in self._steps])
        losses = torch.cat([step.losses for step in self._steps])
        right = torch.cat([step.right for step in self._steps])
        self._steps.clear()
        # how often this worker saw each sample, Σ loss, times right, and Σ margin [4, n]
        rows = torch.stack([torch.ones_like(losses), losses, right.to(losses), margins_of(losses).to(losses)])
        own = torch.zeros(4, len(self.y)).index_add_(1, indices.cpu(), rows.float().cpu())
        times, total_loss, times_right, total_margin = run.worker.sum(own)
        if run.worker.world > 1:
            run.cost.sent += own.nbytes

        seen = times > 0
        right = times_right == times
        self.forgotten += seen & self.right & ~right
        self.learned |= seen & right
        self.losses = (total_loss / times.clamp(min=1)).where(seen, self.losses)
        self.right = right.where(seen, self.right)
        self.epochs += seen
        self.total_margin += total_margin / times.clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        """Return the parts of the record."""
        return {name: getattr(self, name) for name in self._parts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the parts of the record."""
        for name in self._parts:
            setattr(self, name, state[name].clone())


@dataclass(frozen=True, eq=False)
class Rows:
    """One row of each of n samples, such as embeddings or projected gradients, by whose inner products rules select.

    They are read in chunks, so that they may exceed the memory.

    Raises:
        UserError: the values are no float [n, d].

    >>> pool = Rows(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    >>> pool.similarity(Rows(torch.tensor([[0.0, 1.0]])))
    tensor([[0.0000],
            [0.8000]])
    """

    values: Tensor  # float16, float32 or float64 [n, d], in memory or mapped from a file
    tasks: Tensor | None = None  # subtask of each target sample, int64 [n]; None = all of one task

    def __post_init__(self) -> None:
        values = self.values
        if values.dim() != 2 or not values.is_floating_point():
            raise UserError(f"rows are {values.dtype} {list(values.shape)}: needed is float [n, d]")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, indices: Tensor | slice) -> Rows:
        return Rows(self.values[indices], None if self.tasks is None else self.tasks[indices])

    @classmethod
    def mapped(cls, file: str, tasks: Tensor | None = None) -> Rows:
        """Map a NumPy file of rows [n, d], whose pages the system reads when they are used."""
        values = np.load(file, mmap_mode="c")  # PyTorch warns of arrays that cannot be written
        return cls(torch.from_numpy(values), tasks)

    @property
    def by_task(self) -> list[Tensor]:
        """Positions of each task's samples, int64 [m], in the order of the tasks' numbers; refuses a target of none."""
        if not len(self):
            raise UserError("the target has no samples")
        if self.tasks is None:
            return [torch.arange(len(self))]
        return [(self.tasks == task).nonzero()[:, 0] for task in self.tasks.unique()]

    def similarities(self, target: Tensor) -> Iterator[Tensor]:
        """Yield the inner products of consecutive rows with those of a target [V, d], float32 [c, V].

        Raises:
            UserError: the target's rows have another length, or a product is NaN or infinite.
        """
        n, width = self.values.shape
        if target.shape[1] != width:
            raise UserError(f"the target has rows of {target.shape[1]} numbers, the samples of {width}")
        transposed = target.float().T
        size = max(1, AT_ONCE // (width + len(target)))
        for start in range(0, n, size):
            products = self.values[start : start + size].float() @ transposed
            if not products.isfinite().all():
                bad = start + int(products.isfinite().all(dim=1).int().argmin())
                raise UserError(f"sample {bad}: its row, or one of the target, holds NaN or infinity")
            yield products

    def similarity(self, target: Rows) -> Tensor:
        """Return the inner products with all rows of a target, float32 [n, V]: cosines if all have length 1."""
        n, count = len(self), len(target)
        check_memory(f"similarities of {n:,} samples to {count:,}", 8 * n * count, "use fewer target samples")
        return torch.cat([*self.similarities(target.values)]) if n else torch.empty(0, count)
