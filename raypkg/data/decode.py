"""Encoded images → pixels: one header, one image, or a batch by as many threads as torch uses."""

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from raypkg.core.errors import UserError

GREY = {"1", "L", "LA", "I", "I;16", "I;16B", "F"}  # PIL's modes without colour

Name = Callable[[int], str]
Shape = tuple[int, ...]


class ImageHeader(NamedTuple):
    """What an image file says of itself before its pixels."""

    height: int
    width: int
    grey: bool


def header(data: bytes, name: str) -> ImageHeader:
    """Read the header of an encoded image; ``name`` tells the user which one it is."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageHeader(image.height, image.width, image.mode in GREY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{name} is no readable image") from None


def decode(data: bytes | bytearray, shape: Shape) -> Tensor:
    """Decode one image to uint8 [C, H, W]: shorter side resized and centre cropped where its size differs.

    Raises:
        RuntimeError, OSError: the bytes are no image or a damaged one.
    """
    from torchvision.transforms.v2 import functional as transforms

    channels, *sides = shape
    image = _by_torchvision(data, channels) if _is_jpeg_or_png(data) else _by_pillow(data, channels)  # [C, h, w]
    if list(image.shape[1:]) == sides:
        return image
    return transforms.center_crop(transforms.resize(image, [max(sides)], antialias=True), sides)


def decode_all(images: Sequence[bytes], shape: Shape, name: Name) -> np.ndarray:
    """Decode images to uint8 [b, H, W, C]; ``name(i)`` tells the user which one did not decode."""
    out = np.empty((len(images), *shape[1:], shape[0]), np.uint8)

    def fill(start: int, stop: int) -> None:  # a thread takes a run of images: a task for each costs more than decoding
        for i in range(start, stop):
            try:
                out[i] = decode(bytearray(images[i]), shape).permute(1, 2, 0).numpy()
            except (RuntimeError, OSError, SyntaxError, ValueError):
                raise UserError(f"{name(i)} does not decode: it is damaged or no image") from None

    bounds = np.linspace(0, len(images), torch.get_num_threads() + 1).astype(int).tolist()
    list(_threads(torch.get_num_threads()).map(fill, bounds[:-1], bounds[1:]))  # the list raises what a thread raised
    return out


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="decode")


def _is_jpeg_or_png(data: bytes | bytearray) -> bool:
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG"))


def _by_torchvision(data: bytes | bytearray, channels: int) -> Tensor:
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import to_dtype

    mode = ImageReadMode.GRAY if channels == 1 else ImageReadMode.RGB
    image = decode_image(torch.frombuffer(data, dtype=torch.uint8), mode)
    return to_dtype(image, torch.uint8, scale=True)  # a PNG may have 16 bits


def _by_pillow(data: bytes | bytearray, channels: int) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1)
