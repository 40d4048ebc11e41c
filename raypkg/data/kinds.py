"""What a sample can be: an image, a row of numbers or a text; the one place that knows what a model is given of it.

A kind follows from the shape of a sample: (C, H, W) of an image, (D,) of a row, and (L, V) of a text, which is a
sequence of at most L tokens out of V: as mathematics a matrix of zeros and ones, in memory the numbers of the tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator

Shape = tuple[int, ...]
PADDING = -1  # stands behind the last token of a text that is shorter than others of its batch


class Kind(Protocol):
    """What batches of one kind of sample are, as they are stored and as a model takes them."""

    form: str  # of a batch as it is stored, for error messages

    def tensor(self, stored: np.ndarray) -> Tensor:
        """Return what a store gathered as a tensor, without a copy."""

    def inputs(self, x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Return what a model is given of stored samples."""

    def fits(self, x: Tensor, shape: Shape) -> bool:
        """Say whether a batch is one of samples of this shape, as they are stored."""

    def example(self, count: int, shape: Shape) -> Tensor:
        """Return random samples of a shape as a model takes them, the same at every call."""

    def unallocated(self, count: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return a batch as a model takes it on the meta device, where it is a shape and no numbers."""

    def words(self, shape: Shape) -> str:
        """Return a shape for people."""


class Images:
    """Stored as uint8 [b, H, W, C], batches of uint8 [b, C, H, W] in channels_last memory."""

    form = "uint8 [b, C, H, W]"

    def tensor(self, stored: np.ndarray) -> Tensor:
        """Return uint8 [b, C, H, W]."""
        return torch.from_numpy(stored).permute(0, 3, 1, 2)

    def inputs(self, x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Return (x/255 − mean)/std per channel, float [b, C, H, W]."""
        shift, scale = _moments(tuple(mean), tuple(std), x.device, dtype)
        b, c, height, width = x.shape
        # One line of pixels is one row of a matrix: channels alone are too short for vector instructions.
        lines = x.permute(0, 2, 3, 1).reshape(b * height, width * c).to(dtype)
        factor = (scale / 255).repeat(width)  # [W·C]
        offset = -(shift * scale).repeat(width)
        lines = torch.addcmul(offset, lines, factor)
        return lines.view(b, height, width, c).permute(0, 3, 1, 2)

    def fits(self, x: Tensor, shape: Shape) -> bool:
        """Say whether these are bytes of that shape."""
        return x.dtype == torch.uint8 and x.shape[1:] == shape

    def example(self, count: int, shape: Shape) -> Tensor:
        """Return normal numbers, float32 [count, C, H, W]."""
        return _normal(count, shape)

    def unallocated(self, count: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the shape of normalised images, [count, C, H, W]."""
        return torch.empty(count, *shape, dtype=dtype, device="meta")

    def words(self, shape: Shape) -> str:
        """Return "3 × 32 × 32"."""
        return " × ".join(map(str, shape))


class Rows:
    """Stored as float32 [b, D]."""

    form = "float [b, D]"

    def tensor(self, stored: np.ndarray) -> Tensor:
        """Return float32 [b, D]."""
        return torch.from_numpy(stored)

    def inputs(self, x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Return (x − mean)/std per column, float [b, D]."""
        shift, scale = _moments(tuple(mean), tuple(std), x.device, dtype)
        return (x - shift).mul_(scale)

    def fits(self, x: Tensor, shape: Shape) -> bool:
        """Say whether these are numbers of that width."""
        return x.is_floating_point() and x.shape[1:] == shape

    def example(self, count: int, shape: Shape) -> Tensor:
        """Return normal numbers, float32 [count, D]."""
        return _normal(count, shape)

    def unallocated(self, count: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the shape of normalised rows, [count, D]."""
        return torch.empty(count, *shape, dtype=dtype, device="meta")

    def words(self, shape: Shape) -> str:
        """Return "64"."""
        return str(shape[0])


class Texts:
    """Batches of int64 [b, 2, l], l ≤ L the length of the longest: the tokens, and in which of two texts each stands.

    Behind a text's last token both are −1, which no model mistakes for a token, whatever number its padding has.
    """

    form = "int64 [b, 2, l]"

    def tensor(self, stored: np.ndarray) -> Tensor:
        """Return int64 [b, 2, l]."""
        return torch.from_numpy(stored)

    def inputs(self, x: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
        """Return the tokens as they are: there is nothing to normalise, and no precision."""
        return x

    def fits(self, x: Tensor, shape: Shape) -> bool:
        """Say whether these are tokens of that vocabulary, not more than the model takes."""
        length, vocabulary = shape
        if x.dtype != torch.int64 or x.dim() != 3 or x.shape[1] != 2 or x.shape[2] > length:
            return False
        return not x.numel() or bool(x.max() < vocabulary and x.min() >= PADDING)

    def example(self, count: int, shape: Shape) -> Tensor:
        """Return texts of two segments and of all lengths from half of L on, int64 [count, 2, L]."""
        length, vocabulary = shape
        rng = generator(0, "probe")
        tokens = torch.randint(vocabulary, (count, length), generator=rng)
        position = torch.arange(length)
        segments = (position >= length // 2).long().expand(count, length)
        shorter = torch.arange(count) % (length // 2 + 1)  # by how many tokens
        padded = position >= (length - shorter)[:, None]  # [count, L]
        return torch.stack([tokens, segments], 1).masked_fill(padded[:, None], PADDING)

    def unallocated(self, count: int, shape: Shape, dtype: torch.dtype) -> Tensor:
        """Return the shape of texts that all have the most tokens, [count, 2, L]."""
        return torch.empty(count, 2, shape[0], dtype=torch.int64, device="meta")

    def words(self, shape: Shape) -> str:
        """Return "up to 64 tokens out of 8,192"."""
        length, vocabulary = shape
        return f"up to {length} tokens out of {vocabulary:,}"


IMAGES = Images()
ROWS = Rows()
TEXTS = Texts()
OF_DIMENSIONS: dict[int, Kind] = {1: ROWS, 2: TEXTS, 3: IMAGES}


def kind_of(shape: Shape) -> Kind:
    """Return what samples of a shape are.

    Raises:
        UserError: neither (C, H, W), nor (D,), nor (L, V).

    >>> kind_of((3, 32, 32)) is IMAGES, kind_of((64, 8192)).form
    (True, 'int64 [b, 2, l]')
    """
    if len(shape) not in OF_DIMENSIONS:
        raise UserError(f"samples of shape {shape}: needed is (C, H, W) of images, (D,) of rows or (L, V) of texts")
    return OF_DIMENSIONS[len(shape)]


def _normal(count: int, shape: Shape) -> Tensor:
    return torch.randn(count, *shape, generator=generator(0, "probe"))


@lru_cache(8)
def _moments(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return mean and 1/std as tensors, kept: to copy them to a GPU waits for all that it has been given to do."""
    with torch.inference_mode(False):  # whoever asks first, all may compute with them
        shift = torch.tensor(mean, device=device, dtype=dtype)
        deviation = torch.tensor(std, device=device, dtype=dtype)
        return shift, 1 / deviation
