"""The Split: labelled samples of one shape, reached by index and in no other way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError

from .moments import Moments

Take = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set; a subset of it is an index array, never a copy.

    Attributes:
        take: indices int64 [b] → a fresh array, uint8 [b, H, W, C] or float32 [b, D].
        y: the labels, int64 [n].
        classes: the class names; label c is ``classes[c]``.
        shape: (C, H, W) of an image, (D,) of a row.
        mean: of the train split, per channel (images, in units of 1/255) or per column (rows).
        std: likewise the standard deviation.
        augment: names of the augmentations that suit the data.
        columns: names of a table's columns.
    """

    take: Take
    y: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @classmethod
    def from_tensors(
        cls, x: Tensor, y: Tensor, classes: Sequence[str] | None = None, augment: Sequence[str] = ()
    ) -> "Split":
        """Build a split from images uint8 [n, C, H, W] or rows float [n, D], and labels int [n].

        Without ``classes`` the labels must be 0 … C−1, each present; names are then the numbers.

        >>> split = Split.from_tensors(torch.tensor([[0.5, 1.0], [1.5, 1.0]]), torch.tensor([0, 1]))
        >>> split.shape, split.classes, split.mean, split.std
        ((2,), ('0', '1'), (1.0, 1.0), (0.5, 1.0))

        Raises:
            UserError: another shape or dtype, no samples, NaN or infinity, labels out of range or with gaps.
        """
        _check_samples(x, y)
        names = tuple(classes) if classes is not None else _numbered(y)
        check_labels(y.numpy(force=True), len(names), "sample {}".format)
        if x.ndim == 4:
            array = _as_array(x.permute(0, 2, 3, 1), np.uint8)  # [n, H, W, C]
        else:
            array = _as_array(x, np.float32)  # [n, D]
        moments = Moments()
        moments.update(array)
        return cls(
            take=partial(np.take, array, axis=0),
            y=y.long().cpu(),
            classes=names,
            shape=tuple(x.shape[1:]),
            mean=moments.mean,
            std=moments.std,
            augment=tuple(augment),
        )

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return len(self.classes)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        """Gather samples: x uint8 [b, C, H, W] in channels_last memory or float32 [b, D], and y int64 [b].

        Raises:
            IndexError: an index that is no integer in [0, n).
        """
        rows = self._checked(indices)
        x = torch.from_numpy(self.take(rows))  # [b, H, W, C] or [b, D]
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2)
        return x, self.y[torch.from_numpy(rows)]

    def _checked(self, indices: Any) -> np.ndarray:
        rows = np.asarray(indices).reshape(-1)
        if rows.size and rows.dtype.kind not in "iu":
            raise IndexError(f"indices must be integers, not {rows.dtype}")
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"indices {rows.min()} … {rows.max()} do not lie in [0, {len(self)})")
        return rows.astype(np.int64)  # a copy: the caller's array may be read-only, which torch does not accept


def check_labels(y: np.ndarray, num_classes: int, name: Callable[[int], str]) -> None:
    """Refuse a label outside [0, C); ``name(i)`` tells the user which sample it is."""
    wrong = np.flatnonzero((y < 0) | (y >= num_classes))
    if wrong.size:
        first = int(wrong[0])
        raise UserError(f"{name(first)} has label {y[first]}, allowed is 0 … {num_classes - 1}")


def _as_array(x: Tensor, dtype: type) -> np.ndarray:
    return np.ascontiguousarray(x.numpy(force=True), dtype=dtype)


def _check_samples(x: Tensor, y: Tensor) -> None:
    images = x.ndim == 4 and x.dtype == torch.uint8
    rows = x.ndim == 2 and x.is_floating_point()
    if not (images or rows):
        raise UserError(f"x is {x.dtype} {list(x.shape)}, needed is uint8 [n, C, H, W] or float [n, D]")
    integers = not y.is_floating_point() and y.dtype != torch.bool
    if not integers or y.shape != x.shape[:1]:
        raise UserError(f"y is {y.dtype} {list(y.shape)}, needed is int64 [{len(x)}]")
    if not x.numel():
        raise UserError(f"x is empty: {list(x.shape)}")
    if rows and not x.isfinite().all():
        broken = (~x.isfinite()).any(1).nonzero()
        raise UserError(f"row {int(broken[0])} of x holds NaN or infinity")


def _numbered(y: Tensor) -> tuple[str, ...]:
    """Name the classes by their numbers, which must be 0 … C−1."""
    present = y.unique().tolist()
    expected = range(len(present))
    if present != list(expected):
        missing = next(c for c in expected if c not in present)
        raise UserError(f"labels run from {present[0]} to {present[-1]} but none is {missing}; needed are 0 … C−1")
    return tuple(map(str, present))
