"""Rows of numbers for samples, such as embeddings or projected gradients, by whose inner products rules select."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.memory import check_memory

AT_ONCE = 1 << 20  # numbers converted to float32 together


@dataclass(frozen=True, eq=False)
class Rows:
    """One row of each of n samples, read in chunks, so that they may exceed the memory.

    Raises:
        UserError: shapes or dtypes do not fit.

    >>> pool = Rows(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    >>> pool.similarity(Rows(torch.tensor([[0.0, 1.0]])))
    tensor([[0.0000],
            [0.8000]])
    """

    values: Tensor  # float16, float32 or float64 [n, d], in memory or mapped from a file
    tasks: Tensor | None = None  # subtask of each target sample, int64 [n]; None = all of one task

    def __post_init__(self) -> None:
        values, tasks = self.values, self.tasks
        if values.dim() != 2 or not values.is_floating_point():
            raise UserError(f"rows are {values.dtype} {list(values.shape)}: needed is float [n, d]")
        if tasks is not None and (tasks.dtype != torch.int64 or tasks.shape != values.shape[:1]):
            raise UserError(f"tasks are {tasks.dtype} {list(tasks.shape)}: needed is int64 [{len(values)}]")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, indices: Tensor | slice) -> "Rows":
        return Rows(self.values[indices], None if self.tasks is None else self.tasks[indices])

    @classmethod
    def mapped(cls, file: str, tasks: Tensor | None = None) -> "Rows":
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

    def similarity(self, target: "Rows") -> Tensor:
        """Return the inner products with all rows of a target, float32 [n, V]: cosines if all have length 1."""
        n, count = len(self), len(target)
        check_memory(f"similarities of {n:,} samples to {count:,}", 8 * n * count, "use fewer target samples")
        return torch.cat([*self.similarities(target.values)]) if n else torch.empty(0, count)
