"""Encoded images → pixels: one header, one image, or a batch by as many threads as torch uses."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from raypkg.core.errors import UserError

SIXTEEN_BITS = {"I", "I;16", "I;16B"}
GREY = {"1", "L", "LA", *SIXTEEN_BITS}  # Pillow's modes without colour
TOO_LARGE = Image.DecompressionBombError
DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, TOO_LARGE)  # what Pillow raises on bad files

Name = Callable[[int], str]
Shape = tuple[int, ...]


class ImageHeader(NamedTuple):
    """What an image file says of itself before its pixels."""

    height: int
    width: int
    grey: bool


def read_header(data: bytes, name: Name, i: int) -> ImageHeader:
    """Read the header of the i-th encoded image; ``name(i)`` tells the user which one that is."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageHeader(image.height, image.width, image.mode in GREY)
    except TOO_LARGE as error:
        raise UserError(f"{name(i)} is too large to decode: {error}") from None
    except DAMAGED:
        raise UserError(f"{name(i)} does not decode: it is damaged or no image") from None


def decode(data: bytes, shape: Shape) -> np.ndarray:
    """Decode one image to uint8 [H, W, C]: shorter side resized and centre cropped where its size differs."""
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    with Image.open(io.BytesIO(data)) as image:
        # A JPEG that is far larger is decoded at a half, quarter or eighth of its size, which is much faster.
        image.draft(mode, (width, height))
        converted = _eight_bits(image).convert(mode)
        pixels = ImageOps.fit(converted, (width, height), Image.Resampling.BILINEAR)
        return np.asarray(pixels).reshape(height, width, channels)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Keep the upper byte of 16-bit grey, which Pillow's own conversion clips to white."""
    if image.mode not in SIXTEEN_BITS:
        return image
    upper = np.asarray(image) >> 8
    return Image.fromarray(upper.astype(np.uint8))


def decode_all(images: Sequence[bytes], shape: Shape, name: Name) -> np.ndarray:
    """Decode images to uint8 [b, H, W, C]; ``name(i)`` tells the user which one did not decode."""
    channels, height, width = shape
    out = np.empty((len(images), height, width, channels), np.uint8)

    # A thread gets a run of images: to hand out single ones would cost as much as to decode small ones.
    def fill(start: int, stop: int) -> None:
        for i in range(start, stop):
            try:
                out[i] = decode(images[i], shape)
            except DAMAGED:
                raise UserError(f"{name(i)} does not decode: it is damaged or no image") from None

    threads = torch.get_num_threads()
    bounds = np.linspace(0, len(images), threads + 1).astype(int).tolist()
    finished = _threads(threads).map(fill, bounds[:-1], bounds[1:])
    list(finished)  # waits, and raises what a thread raised
    return out


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="decode")
