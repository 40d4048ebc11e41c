"""The Split: labelled samples of one shape, reached by index and in no other way."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError

from .blocks import Blocks, Take
from .kinds import Kind, kind_of
from .moments import Moments


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set; a subset of it is an index array, never a copy.

    Attributes:
        take: indices int64 [b] → a fresh array: uint8 [b, H, W, C], float32 [b, D] or int64 [b, 2, l].
        y: the labels, int64 [n].
        classes: the class names; label c is ``classes[c]``.
        shape: (C, H, W) of an image, (D,) of a row, (L, V) of a text of at most L tokens out of V.
        mean: of the train split, per channel (images, in units of 1/255) or per column (rows); of texts nothing.
        std: likewise the standard deviation.
        augment: names of the augmentations that suit the data.
        columns: names of a table's columns.
        ids: which samples of other data the samples stand for, int64 [n]; None where their positions say it.
        truth: true labels beside wrong ones in ``y``, for measuring only, int64 [n]; None where there are no others.
        blocks: where the samples lie if they are read by blocks; None where each is at hand.
        held: the only positions whose samples it gives, int64 [m], ascending; None where it gives all.
    """

    take: Take
    y: Tensor
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    ids: Tensor | None = None
    truth: Tensor | None = None
    blocks: Blocks | None = None
    held: Tensor | None = None

    @classmethod
    def from_tensors(
        cls,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        classes: Sequence[str] | None = None,
        augment: Sequence[str] = (),
    ) -> "Split":
        """Build a split from images uint8 [n, C, H, W] or rows float [n, D], and labels int [n].

        They are tensors or NumPy arrays; integers and floats may have any width. Without ``classes`` the labels must be
        0 … C−1, each present; names are then the numbers.

        >>> split = Split.from_tensors(torch.tensor([[0.5, 1.0], [1.5, 1.0]]), torch.tensor([0, 1]))
        >>> split.shape, split.classes, split.mean, split.std
        ((2,), ('0', '1'), (1.0, 1.0), (0.5, 1.0))

        Raises:
            UserError: another type, shape or dtype, no samples, values that float32 cannot hold, labels out of range or
                with gaps, or two classes of one name.
        """
        samples = _as_array(x, "x")
        labels = _as_array(y, "y")
        _check_samples(samples, labels)
        names = tuple(map(str, classes)) if classes is not None else _numbered(labels)
        if (twice := repeated(names)) is not None:
            raise UserError(f"two of the {len(names)} classes are called {twice!r}")
        check_labels(labels, len(names), "sample {}".format)
        stored = _stored(samples)
        moments = Moments()
        moments.update(stored)
        return cls(
            take=partial(np.take, stored, axis=0),
            y=torch.from_numpy(labels.astype(np.int64)),  # a copy: the array may be read-only
            classes=names,
            shape=samples.shape[1:],
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

    @property
    def kind(self) -> Kind:
        """What the samples are."""
        return kind_of(self.shape)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        """Gather samples: x as their kind is stored, such as uint8 [b, C, H, W] of images, and y int64 [b].

        Raises:
            IndexError: an index that is no integer in [0, n).
        """
        rows = self._checked(indices)
        x = self.kind.tensor(self.take(rows))
        return x, self.y[torch.from_numpy(rows)]

    def inputs(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return what a model that computes in ``dtype`` is given of stored samples x: numbers are normalised."""
        return self.kind.inputs(x, self.mean, self.std, dtype)

    def spread(self, count: int, blocks: int | None = None) -> Tensor:
        """Return ascending positions of so many samples, spread over the split, or over so many of its blocks."""
        positions = torch.arange(len(self))
        if blocks is not None and self.blocks is not None:
            present = self.blocks.of.unique()
            looked_at = present[_spread(len(present), blocks)]
            positions = positions[torch.isin(self.blocks.of, looked_at)]
        return positions[_spread(len(positions), count)]

    def _checked(self, indices: Any) -> np.ndarray:
        rows = np.asarray(indices).reshape(-1)
        if rows.size and rows.dtype.kind not in "iu":
            raise IndexError(f"indices must be integers, not {rows.dtype}")
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"indices {rows.min()} … {rows.max()} do not lie in [0, {len(self)})")
        return rows.astype(np.int64)  # a copy: the caller's array may be read-only, which torch does not accept


@dataclass(frozen=True)
class _Held:
    """Gathers those samples that are held, and no others."""

    indices: np.ndarray  # int64 [m], ascending
    take: Take  # of their places among them

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        places = np.searchsorted(self.indices, indices)
        places = np.minimum(places, len(self.indices) - 1)
        if (self.indices[places] != indices).any():
            raise IndexError("some of these samples are not held here")
        return self.take(places)


def with_values(split: Split, indices: Tensor) -> Split:
    """Return a split that has the values of some samples with it, and needs no file; it gives no others.

    >>> split = with_values(Split.from_tensors(torch.eye(3), torch.arange(3)), torch.tensor([2, 0]))
    >>> split.batch([2])[0].tolist()
    [[0.0, 0.0, 1.0]]
    """
    held = indices.sort().values
    values = split.take(held.numpy())
    take = _Held(held.numpy(), partial(np.take, values, axis=0))
    return replace(split, take=take, blocks=None, held=held)


def at_hand(split: Split, indices: Tensor) -> Split:
    """Return the split with some samples on this machine: a copy if it is read by blocks, which gives no others.

    Raises:
        UserError: the disk is too small for them.
    """
    if split.blocks is None or not len(indices):
        return split
    held = indices.unique()
    take = _Held(held.numpy(), split.blocks.copied(held.numpy()))
    return replace(split, take=take, blocks=None, held=held)


def check_labels(y: np.ndarray, num_classes: int, name: Callable[[int], str]) -> None:
    """Refuse a label outside [0, C); ``name(i)`` tells the user which sample it is."""
    wrong = np.flatnonzero((y < 0) | (y >= num_classes))
    if wrong.size:
        first = int(wrong[0])
        raise UserError(f"{name(first)} has label {y[first]}, allowed is 0 … {num_classes - 1}")


def _spread(n: int, count: int) -> Tensor:
    """Return ``count`` of the positions 0 … n−1, evenly spaced; some twice where n is less."""
    return torch.linspace(0, n - 1, count).long()


def repeated(names: Iterable[str]) -> str | None:
    """Return the first name that stands twice, or None.

    >>> repeated(["cat", "dog", "dog"]), repeated(["cat", "dog"])
    ('dog', None)
    """
    counts = Counter(names)
    return next((name for name, times in counts.items() if times > 1), None)


def _as_array(values: Any, name: str) -> np.ndarray:
    """Return a tensor or an array as an array, without a copy where that is possible."""
    if isinstance(values, np.ndarray):
        return np.asarray(values)  # of a subclass, its values
    if not isinstance(values, Tensor):
        raise UserError(f"{name} is a {type(values).__name__}, needed is a tensor or a NumPy array")
    if values.layout != torch.strided:
        raise UserError(f"{name} is a tensor of layout {values.layout}, needed is a dense one")
    if values.dtype == torch.bfloat16:  # which NumPy does not know
        values = values.float()
    return values.numpy(force=True)


def _check_samples(x: np.ndarray, y: np.ndarray) -> None:
    images = x.ndim == 4 and x.dtype == np.uint8
    rows = x.ndim == 2 and x.dtype.kind == "f"
    if not (images or rows):
        raise UserError(f"x is {x.dtype} {list(x.shape)}, needed is uint8 [n, C, H, W] or float [n, D]")
    integers = y.dtype.kind in "iu"
    if not integers or y.shape != x.shape[:1]:
        raise UserError(f"y is {y.dtype} {list(y.shape)}, needed are integers [{len(x)}]")
    if not x.size:
        raise UserError(f"x is empty: {list(x.shape)}")


def _stored(x: np.ndarray) -> np.ndarray:
    """Return samples as they are kept: images uint8 [n, H, W, C], rows float32 [n, D]."""
    if x.ndim == 4:
        return np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    with np.errstate(over="ignore"):  # becomes infinity, which is refused
        rows = np.ascontiguousarray(x, dtype=np.float32)
    finite = np.isfinite(rows).all(1)
    if not finite.all():
        broken = int(finite.argmin())
        raise UserError(f"row {broken} of x holds NaN or infinity, or a number beyond float32")
    return rows


def _numbered(y: np.ndarray) -> tuple[str, ...]:
    """Name the classes by their numbers, which must be 0 … C−1."""
    present = np.unique(y).tolist()
    expected = range(len(present))
    if present != list(expected):
        missing = next(c for c in expected if c not in present)
        raise UserError(f"labels run from {present[0]} to {present[-1]} but none is {missing}; needed are 0 … C−1")
    return tuple(map(str, present))
