"""The kinds of sample, image, row and text, and their conversion to the input of a model.

The shape of a sample decides its kind: (C, H, W) is an image, (D,) a row of numbers, (L, V) a text of at most L tokens
out of V.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator

Shape = tuple[int, ...]
Floats = Sequence[float]
Empty = Callable[..., Tensor]  # torch.empty, or another source of memory for a batch
PADDING = -1  # follows the last token of a text that is shorter than others of its batch
AT_ONCE = 1 << 19  # numbers converted at once on a CPU: the bytes as numbers stay in the cache
SMALLEST = float(np.finfo(np.float32).tiny)  # smallest standard deviation whose inverse float32 can hold


class Kind(ABC):
    """Stored batches of one kind of sample, and the input that a model computes from them."""

    form: str  # of a stored batch, for error messages
    raw: str  # what a user has

    def tensor(self, stored: np.ndarray) -> Tensor:
        """Convert a stored batch to a tensor without a copy."""
        return torch.from_numpy(stored)

    @abstractmethod
    def inputs(self, x: Tensor, mean: Floats, std: Floats, dtype: torch.dtype, empty: Empty = torch.empty) -> Tensor:
        """Convert stored samples to the input of a model."""

    @abstractmethod
    def fits(self, x: Tensor, shape: Shape) -> bool:
        """Return True if a batch holds stored samples of this shape."""

    def example(self, count: int, shape: Shape) -> Tensor:
        """Return random model inputs, the same in every call."""
        return torch.randn(count, *shape, generator=generator(0, "probe"))

    def words(self, shape: Shape) -> str:
        """Describe a shape for people."""
        return " × ".join(map(str, shape))


class _Images(Kind):
    """Stored as uint8 [b, H, W, C]; batches are uint8 [b, C, H, W] in channels_last memory."""

    form = "uint8 [b, C, H, W]"
    raw = "Pillow's images"

    def tensor(self, stored: np.ndarray) -> Tensor:
        return torch.from_numpy(stored).permute(0, 3, 1, 2)

    def inputs(self, x: Tensor, mean: Floats, std: Floats, dtype: torch.dtype, empty: Empty = torch.empty) -> Tensor:
        # (x/255 − mean)/std per channel
        shift, scale = _normalisation(tuple(mean), tuple(std), x.device, dtype)
        b, c, height, width = x.shape
        # One line of pixels is one row of a matrix: channels alone are too short for vector instructions.
        lines = x.permute(0, 2, 3, 1).reshape(b * height, width * c)
        factor = (scale / 255).repeat(width)  # [W·C]
        offset = -(shift * scale).repeat(width)
        out = empty(lines.shape, dtype=dtype, device=x.device)
        size = max(1, AT_ONCE // (width * c) if x.device.type == "cpu" else len(lines))
        for part, into in zip(lines.split(size), out.split(size), strict=True):
            torch.addcmul(offset, part.to(dtype), factor, out=into)
        return out.view(b, height, width, c).permute(0, 3, 1, 2)

    def fits(self, x: Tensor, shape: Shape) -> bool:
        return x.dtype == torch.uint8 and x.shape[1:] == shape


class _Rows(Kind):
    """Stored as float32 [b, D]."""

    form = "float [b, D]"
    raw = "lists of numbers"

    def inputs(self, x: Tensor, mean: Floats, std: Floats, dtype: torch.dtype, empty: Empty = torch.empty) -> Tensor:
        # (x − mean)/std per column
        shift, scale = _normalisation(tuple(mean), tuple(std), x.device, dtype)
        if x.requires_grad:  # out= has no gradient
            return (x - shift).mul_(scale)
        out = empty(x.shape, dtype=torch.promote_types(x.dtype, dtype), device=x.device)
        return torch.sub(x, shift, out=out).mul_(scale)

    def fits(self, x: Tensor, shape: Shape) -> bool:
        return x.is_floating_point() and x.shape[1:] == shape


class _Texts(Kind):
    """Batches of int64 [b, 2, l], l ≤ L: the tokens, and the segment of each: first or second text, prompt or answer.

    Both are −1 after the last token: no model mistakes that for a token, whatever number its own padding has.
    """

    form = "int64 [b, 2, l]"
    raw = "texts or pairs of them"

    def inputs(self, x: Tensor, mean: Floats, std: Floats, dtype: torch.dtype, empty: Empty = torch.empty) -> Tensor:
        return x

    def fits(self, x: Tensor, shape: Shape) -> bool:
        length, vocabulary = shape
        if x.dtype != torch.int64 or x.dim() != 3 or x.shape[1] != 2 or x.shape[2] > length:
            return False
        return not x.numel() or bool(x.max() < vocabulary and x.min() >= PADDING)

    def example(self, count: int, shape: Shape) -> Tensor:
        # Two segments each, and all lengths from L/2 to L.
        length, vocabulary = shape
        rng = generator(0, "probe")
        tokens = torch.randint(vocabulary, (count, length), generator=rng)
        position = torch.arange(length)
        segments = (position >= length // 2).long().expand(count, length)
        shorter = torch.arange(count) % (length // 2 + 1)  # by this many tokens
        padded = position >= (length - shorter)[:, None]  # [count, L]
        return torch.stack([tokens, segments], 1).masked_fill(padded[:, None], PADDING)

    def words(self, shape: Shape) -> str:
        length, vocabulary = shape
        return f"up to {length} tokens out of {vocabulary:,}"


IMAGES = _Images()
ROWS = _Rows()
TEXTS = _Texts()
OF_DIMENSIONS: dict[int, Kind] = {1: ROWS, 2: TEXTS, 3: IMAGES}


def kind_of(shape: Shape) -> Kind:
    """Return the kind of samples of a shape; refuse one that is none of (C, H, W), (D,) and (L, V)."""
    if len(shape) not in OF_DIMENSIONS:
        raise UserError(f"samples of shape {shape}: needed is (C, H, W) of images, (D,) of rows or (L, V) of texts")
    return OF_DIMENSIONS[len(shape)]


@lru_cache(8)
def _normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return mean and 1/std as tensors, cached: a copy to a GPU waits for all work that is queued there."""
    with torch.inference_mode(False):  # a tensor created in inference mode could not be used in training
        return torch.tensor(mean, device=device, dtype=dtype), 1 / torch.tensor(std, device=device, dtype=dtype)


class Moments:
    """Running mean and population standard deviation over all axes but the last.

    Blocks are merged by the update of Chan, Golub & LeVeque (1979), in float64:
    ``M₂ ← M₂ + M₂' + δ²·n·n'/(n + n')`` with ``δ`` the difference of the two means.

    >>> moments = Moments()
    >>> moments.update(np.array([[0.0, 5.0]])), moments.update(np.array([[2.0, 5.0]]))
    (None, None)
    >>> moments.mean, moments.std
    ((1.0, 5.0), (1.0, 1.0))
    """

    rows_at_once = 1 << 18  # bounds the float64 copy
    pixels_at_once = 1 << 20  # bounds the 16-bit copy

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        state = state or {"n": 0, "mean": [0.0], "m2": [0.0]}
        self._n: int = state["n"]
        self._mean = np.array(state["mean"])  # [C] after the first block
        self._m2 = np.array(state["m2"])  # sum of squared distances from the mean

    def update(self, block: np.ndarray) -> None:
        """Merge rows [m, D], or pixels uint8 [m, H, W, C] in units of 1/255."""
        pixels = block.dtype == np.uint8
        channels = block.shape[-1]
        samples = block.reshape(-1, block.shape[-2] * channels if pixels else channels)
        step = max(1, self.pixels_at_once // samples.shape[1]) if pixels else self.rows_at_once
        for start in range(0, len(samples), step):
            chunk = samples[start : start + step]
            if pixels:  # exact sums of integers
                wide = chunk.astype(np.uint16)  # holds the square of a byte
                sums = wide.sum(0, dtype=np.int64).reshape(-1, channels).sum(0).tolist()
                wide *= wide
                squares = wide.sum(0, dtype=np.int64).reshape(-1, channels).sum(0).tolist()
                n = chunk.size // channels
                mean = np.array(sums) / (255 * n)
                # Python's integers do not overflow: M₂ = Σx² − (Σx)²/n, rounded once.
                pairs = zip(sums, squares, strict=True)
                m2 = np.array([(n * square - total**2) / (255**2 * n) for total, square in pairs])
            else:
                rows = chunk.astype(np.float64)
                n = len(rows)
                mean = rows.mean(0)
                rows -= mean
                m2 = np.einsum("nc,nc->c", rows, rows)
            total = self._n + n
            delta = mean - self._mean
            self._m2 = self._m2 + m2 + delta**2 * (self._n * n / total)
            self._mean = self._mean + delta * (n / total)
            self._n = total

    @property
    def state(self) -> dict[str, Any]:
        """The complete state, which survives JSON bit for bit and restores the moments."""
        return {"n": self._n, "mean": self._mean.tolist(), "m2": self._m2.tolist()}

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean per channel."""
        return tuple(self._mean.tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation per channel; 1 for a constant channel, so that dividing by it is harmless."""
        std = np.sqrt(self._m2 / self._n)
        return tuple(np.where(std > SMALLEST, std, 1.0).tolist())
