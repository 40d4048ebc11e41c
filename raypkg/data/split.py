"""The Split: labelled samples of one shape, addressed by index and in no other way."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError, unknown
from raypkg.core.seeds import generator

from .kinds import Empty, Kind, Moments, kind_of

Take = Callable[[np.ndarray], np.ndarray]  # int64 [b] → samples [b, …]
SPARE = 16  # extra blocks to hold: threads that load ahead do not release them in strict order


@dataclass(frozen=True)
class Blocks:
    """Location of a split's samples in blocks, which are only ever read whole."""

    of: Tensor  # block of each sample, int64 [n]
    window: int  # number of blocks that training batches draw from at a time
    copied: Callable[[np.ndarray], Take]  # copies samples, int64 [m] ascending, to this machine; takes 0 … m−1 of them
    hold: Callable[[int], None]  # raises the number of blocks held in memory

    def hold_for(self, positions: Tensor, batch_size: int, ahead: int, world: int) -> None:
        """Hold enough blocks that one worker's batches fetch none twice while it is needed.

        An epoch visits ``positions``, int64 [n], in batches of ``batch_size`` over all workers. ``ahead`` batches are
        loaded at once, and each of the ``world`` workers needs its share of the window.
        """
        blocks = len(self.of[positions].unique())
        new = math.ceil(batch_size * blocks / len(positions))  # blocks by which a batch advances the window
        self.hold(math.ceil(self.window / world) + ahead * new + SPARE)

    def at(self, positions: Tensor) -> "Blocks":
        """Return the blocks of the samples at some positions, which may repeat."""
        rows = positions.numpy()

        def copied(indices: np.ndarray) -> Take:
            distinct, place = np.unique(rows[indices], return_inverse=True)
            take = self.copied(distinct)
            return lambda chosen: take(place[chosen])

        return replace(self, of=self.of[positions], copied=copied)


def shuffled_by_blocks(of: Tensor, window: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Return the batches of an epoch, in an order that needs only ``window`` blocks at a time.

    The block at place p of a random order of the B blocks yields its samples at times (p + W·u) mod B, with W blocks
    in the window and u uniform in [0, 1). At any time W blocks yield samples at equal rates; W = B gives a uniform
    permutation. Batches are at most ``batch_size`` samples and as even as possible.
    """
    rng = generator(seed, "shuffle", epoch)
    blocks, block = of.unique(return_inverse=True)
    count = len(blocks)  # B
    place = torch.randperm(count, generator=rng)[block]  # p
    u = torch.rand(len(of), generator=rng, dtype=torch.float64)
    time = (place + min(window, count) * u) % count
    # Within a batch, samples are ordered by a random number of their block. A worker's slice of consecutive batches
    # then comes from few of the W blocks, and from the same ones.
    number = torch.randperm(count, generator=rng)[block]
    batches = time.argsort(stable=True).tensor_split(-(-len(of) // batch_size))
    return tuple(batch[number[batch].argsort(stable=True)] for batch in batches)


@dataclass(frozen=True, eq=False)
class Split:
    """One split of a data set; a subset of it is an index array, never a copy.

    An instruction for a language model is a text whose answered tokens, the only ones with a loss, are in segment 1.
    Its class is its source. Samples are never packed.
    """

    take: Take  # returns a fresh array: uint8 [b, H, W, C], float32 [b, D] or int64 [b, 2, l]
    y: Tensor  # labels, int64 [n]
    classes: tuple[str, ...]  # label c is called classes[c]
    shape: tuple[int, ...]  # (C, H, W) of an image, (D,) of a row, (L, V) of a text: at most L tokens out of V
    mean: tuple[float, ...]  # of the training split, per channel (in units of 1/255) or column; () for texts
    std: tuple[float, ...]
    augment: tuple[str, ...] = ()  # names of the augmentations that suit the data
    columns: tuple[str, ...] = ()  # column names of a table
    ids: Tensor | None = None  # sample of some original data that each row stands for, int64 [n]; None = its position
    truth: Tensor | None = None  # true labels where y has wrong ones, for measurement only, int64 [n]
    blocks: Blocks | None = None  # set if samples are read by blocks
    local: Tensor | None = None  # the only positions whose samples are on this machine, int64 [m] ascending; None = all
    tokenizer: str = ""  # as JSON, if it was trained on the texts

    @classmethod
    def from_tensors(
        cls,
        x: Tensor | np.ndarray,
        y: Tensor | np.ndarray,
        classes: Sequence[str] | None = None,
        augment: Sequence[str] = (),
    ) -> "Split":
        """Build a split from images uint8 [n, C, H, W] or rows float [n, D], and integer labels [n].

        Without ``classes`` the labels must be 0 … C−1, each present; they are then named by their numbers.

        >>> split = Split.from_tensors(torch.tensor([[0.5, 1.0], [1.5, 1.0]]), torch.tensor([0, 1]))
        >>> split.shape, split.classes, split.mean, split.std
        ((2,), ('0', '1'), (1.0, 1.0), (0.5, 1.0))

        Raises:
            UserError: wrong type, shape or dtype; no samples; values beyond float32; invalid labels or class names.
        """
        samples = as_array(x)
        labels = as_array(y)
        are_images = samples.ndim == 4 and samples.dtype == np.uint8
        are_rows = samples.ndim == 2 and samples.dtype.kind == "f"
        if not (are_images or are_rows) or not samples.size:
            given = f"{samples.dtype} {list(samples.shape)}"
            raise UserError(f"x is {given}, needed is uint8 [n, C, H, W] or float [n, D], not empty")
        if labels.dtype.kind not in "iu" or labels.shape != samples.shape[:1]:
            raise UserError(f"y is {labels.dtype} {list(labels.shape)}, needed are integers [{len(samples)}]")

        if classes is None:
            present = np.unique(labels).tolist()
            missing = next((c for c in range(len(present)) if c not in present), None)
            if missing is not None:
                span = f"{present[0]} to {present[-1]}"
                raise UserError(f"labels run from {span} but none is {missing}; needed are 0 … C−1")
            classes = present
        names = tuple(map(str, classes))
        if (twice := repeated(names)) is not None:
            raise UserError(f"two of the {len(names)} classes are called {twice!r}")
        check_labels(labels, len(names), "sample {}".format)

        if are_images:
            stored = np.ascontiguousarray(samples.transpose(0, 2, 3, 1))  # [n, H, W, C]
        else:
            with np.errstate(over="ignore"):  # overflows to infinity, refused below
                stored = np.ascontiguousarray(samples, dtype=np.float32)
            finite = np.isfinite(stored).all(1)
            if not finite.all():
                raise UserError(f"row {finite.argmin()} of x holds NaN or infinity, or a number beyond float32")
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
        """The kind of sample: image, row or text."""
        return kind_of(self.shape)

    def batch(self, indices: Any) -> tuple[Tensor, Tensor]:
        """Gather samples: x as stored, such as uint8 [b, C, H, W] for images, and y int64 [b].

        Raises:
            IndexError: an index is not an integer in [0, n).
        """
        rows = np.asarray(indices).reshape(-1)
        if rows.size and rows.dtype.kind not in "iu":
            raise IndexError(f"indices must be integers, not {rows.dtype}")
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"indices {rows.min()} … {rows.max()} do not lie in [0, {len(self)})")
        rows = rows.astype(np.int64)  # a copy: the caller's array may be read-only, which torch does not accept
        return self.kind.tensor(self.take(rows)), self.y[torch.from_numpy(rows)]

    def inputs(self, x: Tensor, dtype: torch.dtype = torch.float32, empty: Empty = torch.empty) -> Tensor:
        """Convert stored samples to the input of a model that computes in ``dtype``: numbers are normalised."""
        return self.kind.inputs(x, self.mean, self.std, dtype, empty)

    def spread(self, count: int, blocks: int | None = None) -> Tensor:
        """Return ``count`` ascending positions spread evenly over the split, or over ``blocks`` of its blocks."""

        def spaced(n: int, count: int) -> Tensor:
            return torch.linspace(0, n - 1, count).long()

        positions = torch.arange(len(self))
        if blocks is not None and self.blocks is not None:
            present = self.blocks.of.unique()
            positions = positions[torch.isin(self.blocks.of, present[spaced(len(present), blocks)])]
        return positions[spaced(len(positions), count)]


def with_values(split: Split, indices: Tensor) -> Split:
    """Return a split that carries the values of some samples, needs no file, and has no other samples.

    >>> split = with_values(Split.from_tensors(torch.eye(3), torch.arange(3)), torch.tensor([2, 0]))
    >>> split.batch([2])[0].tolist()
    [[0.0, 0.0, 1.0]]
    """
    local = indices.sort().values
    values = split.take(local.numpy())
    take = partial(_take_local, local.numpy(), partial(np.take, values, axis=0))
    return replace(split, take=take, blocks=None, local=local)


def at_hand(split: Split, indices: Tensor) -> Split:
    """Copy some samples of a split that is read by blocks to this machine; other splits are returned unchanged."""
    if split.blocks is None or not len(indices):
        return split
    local = indices.unique()
    take = partial(_take_local, local.numpy(), split.blocks.copied(local.numpy()))
    return replace(split, take=take, blocks=None, local=local)


def _take_local(local: np.ndarray, take: Take, indices: np.ndarray) -> np.ndarray:
    """Gather samples by their positions in the split, out of those that are local."""
    places = np.minimum(np.searchsorted(local, indices), len(local) - 1)
    if (local[places] != indices).any():
        raise IndexError("some of these samples are not on this machine")
    return take(places)


def aligned(split: Split, like: Split, what: str, *, classes: bool = True) -> Split:
    """Return a split with the normalisation of another and, if ``classes``, its class numbers.

    Both must have the same shape and column names, and the other must have all classes; ``what`` names it in errors.
    """
    if split.shape != like.shape:
        raise UserError(f"{what}: samples of shape {split.shape}, those of training have {like.shape}")
    if split.columns and like.columns and split.columns != like.columns:
        ours = ", ".join(like.columns)
        raise UserError(f"{what}: columns {', '.join(split.columns)}, those of training are {ours}")
    if not classes:
        return replace(split, mean=like.mean, std=like.std)
    for name in split.classes:
        if name not in like.classes:
            raise unknown(f"class of {what}", name, like.classes)
    number = torch.tensor([like.classes.index(name) for name in split.classes])
    return replace(split, y=number[split.y], classes=like.classes, mean=like.mean, std=like.std)


def check_labels(y: np.ndarray, num_classes: int, name: Callable[[int], str]) -> None:
    """Refuse a label outside [0, C); ``name(i)`` describes the i-th sample in the error."""
    wrong = np.flatnonzero((y < 0) | (y >= num_classes))
    if wrong.size:
        first = int(wrong[0])
        raise UserError(f"{name(first)} has label {y[first]}, allowed is 0 … {num_classes - 1}")


def repeated(names: Iterable[str]) -> str | None:
    """Return the first name that occurs twice, or None."""
    counts = Counter(names)
    return next((name for name, times in counts.items() if times > 1), None)


def as_array(values: Any) -> np.ndarray:
    """Convert a tensor, an array or lists to an array, without a copy where possible."""
    if not isinstance(values, Tensor):
        return np.asarray(values)  # drops a subclass, such as a masked array
    if values.dtype == torch.bfloat16:  # unknown to NumPy
        values = values.float()
    return values.numpy(force=True)


# Index arrays that partition samples into parts with the same mix of classes


def hold_out(
    y: Tensor, fraction: float, generator: torch.Generator, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Split positions into training positions and a held-out share of each class.

    The share, in [0, 1), is rounded per class; each class keeps at least one training sample. ``ids``, int64 [n], name
    the sample that each row stands for. Rows of one sample stay together, and the draw is that of a data set which
    holds each of these samples once. Both results ascend; together they are 0 … n−1.
    """
    if ids is not None:
        samples, sample_of_row = ids.unique(return_inverse=True)
        labels = torch.empty(len(samples), dtype=torch.int64)
        labels[sample_of_row] = y
        _, held_out = hold_out(labels, fraction, generator)
        is_held_out = torch.isin(sample_of_row, held_out)
        return (~is_held_out).nonzero()[:, 0], is_held_out.nonzero()[:, 0]
    training = []
    validation = []
    for members in _by_class(torch.randperm(len(y), generator=generator), y):
        size = min(round(fraction * len(members)), len(members) - 1)
        validation.append(members[:size])
        training.append(members[size:])
    return torch.cat(training).sort().values, torch.cat(validation).sort().values


def stratified_shards(
    y: Tensor, shards: int, size: int, generator: torch.Generator, indices: Tensor | None = None
) -> list[Tensor]:
    """Draw disjoint shards of ``size`` samples, each with the classes in proportion to within one sample.

    Each class contributes its share of all shards·size samples. These are dealt like cards, class by class, so that
    every shard gets ⌊t⌋ or ⌈t⌉ samples of a class whose exact share is t. ``y`` holds the labels of all samples;
    ``indices`` restricts the draw to some of them. A shard that would lack a class is refused.
    """
    if indices is None:
        indices = torch.arange(len(y))
    n = len(indices)
    if shards * size > n or size < 1:
        raise UserError(f"{shards} disjoint shards of {size} samples each cannot be had from {n} samples")
    order = indices[torch.randperm(n, generator=generator)]
    labels, counts = y[order].unique(return_counts=True)  # [C]
    # The exact share of a class, rounded down, plus one for the largest remainders. Integers keep this exact.
    exact = counts * (shards * size)  # n times the exact shares
    shares = exact // n
    left = shards * size - int(shares.sum())
    largest_first = (exact % n).argsort(descending=True, stable=True)
    shares[largest_first[:left]] += 1
    if shares.min() < shards:
        rarest = shares.argmin()
        missing = f"class {labels[rarest]} ({counts[rarest]} samples)"
        raise UserError(f"a shard of {size} samples holds none of {missing}: use fewer or larger shards")
    dealt = [members[:share] for members, share in zip(_by_class(order, y), shares.tolist(), strict=True)]
    # Consecutive samples go to different shards, so each class, a consecutive run, reaches all shards evenly.
    hands = torch.cat(dealt).view(size, shards)
    return [hand.sort().values for hand in hands.unbind(1)]


def _by_class(order: Tensor, y: Tensor) -> list[Tensor]:
    """Return the positions of each class that occurs, in the order given, classes ascending."""
    labels = y[order]
    return [order[labels == label] for label in labels.unique()]
