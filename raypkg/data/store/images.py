"""From a stream of encoded images to a Split.

A set that fits ``DECODED_BYTES`` when decoded is decoded once, into a store of pixels. A larger one is stored encoded
and decoded on every read.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Annotated, Literal, NamedTuple

import numpy as np
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.data.augment import default_augment
from raypkg.data.files import Place, identity_of
from raypkg.data.memory import check_samples
from raypkg.data.split import Split, check_labels

from .cache import Target, cached, write_store
from .decode import Name, Shape, decode_all, read_header
from .stored import Block, Header, Stored

DECODED_BYTES = (2 << 30) - 1  # the most that Arrow allows one sample as well
SAMPLED = 4096  # about so many images of an encoded store give its statistics
SET_SIZE = "set option size, such as --set dataset.options.size=224 (--set size=224 for effray data)"

Side = Annotated[int, Field(ge=0, le=1 << 16)]  # of an image, in pixels; 0 = its own

Encoded = tuple[list[bytes], np.ndarray]  # images and their labels


@dataclass(frozen=True)
class Examples:
    """The encoded images of one split in a stream of batches; ``name(i)`` tells the user where the i-th came from."""

    length: int
    classes: tuple[str, ...]
    batches: Callable[[], Iterator[Encoded]]
    name: Name


@dataclass(frozen=True)
class ImageSource:
    """A data set of encoded images: what it takes to build the stores of its splits.

    Attributes:
        path: the store of each split, "train" or "test".
        examples: the images of each split; called only when its store is built.
        size: side of the images, resized on their shorter side and centre cropped; 0 keeps their own single size.
        files: of each split.
    """

    path: Callable[[str], Target]
    examples: Callable[[str], Examples]
    size: int
    files: Mapping[str, Sequence[Place]]

    def split(self, name: str) -> Split:
        """Return a split over its store, which is built if it is missing."""
        store = cached(self.path(name), partial(self._build, name), self.files[name])
        return store.as_split(_Decoded if store.header.kind == "encoded" else None)

    def _build(self, name: str, target: Target) -> None:
        """Build a store in one pass over its source, or two where a colour image comes after grey ones alone."""
        examples = self.examples(name)
        if not examples.length:
            raise UserError(f"the {name} split holds no images")
        encoded = sum(identity_of(file).size for file in self.files[name])  # bytes
        write_to = partial(_write, target, examples, encoded)
        parts = surveyed(examples, self.size)
        first = next(parts)
        parts = chain([first], parts)
        if name != "train":
            train = self.split("train")  # it decides on channels and class names
            if first.shape[1:] != train.shape[1:]:
                sides = _sides(first.shape[1:])
                raise UserError(f"{name} images are {sides}, train images {_sides(train.shape[1:])}: {SET_SIZE}")
            write_to(parts, train.shape, train.classes)
            return
        try:
            write_to(_with_channels(parts, first.shape[0]), first.shape, examples.classes)
        except ColourAfterGrey:
            colour = (3, *first.shape[1:])
            write_to(surveyed(examples, self.size), colour, examples.classes)


class Surveyed(NamedTuple):
    """Encoded images on their way into a store."""

    start: int  # how many came before
    images: list[bytes]
    y: np.ndarray  # [m]
    shape: Shape  # (C, H, W), with one channel if all of these images are grey


class ColourAfterGrey(Exception):
    """An image has colour, and those that came before it had none."""


def surveyed(examples: Examples, size: int) -> Iterator[Surveyed]:
    """Stream the images of a split and read every header.

    Raises:
        UserError: images of several sizes while ``size`` is 0, or something that is no image.
    """
    start = 0
    sides: Shape = ()  # height and width of the first image
    for images, y in examples.batches():
        headers = [read_header(data, examples.name, start + i) for i, data in enumerate(images)]
        for header in headers:
            own = (size, size) if size else (header.height, header.width)
            sides = sides or own
            if own != sides:
                raise UserError(f"images of several sizes, such as {_sides(sides)} and {_sides(own)}: {SET_SIZE}")
        if headers:
            channels = 1 if all(header.grey for header in headers) else 3
            yield Surveyed(start, images, y, (channels, *sides))
        start += len(images)


def _with_channels(parts: Iterable[Surveyed], channels: int) -> Iterator[Surveyed]:
    for part in parts:
        if part.shape[0] > channels:
            raise ColourAfterGrey
        yield part


def _write(
    target: Target, examples: Examples, encoded: int, parts: Iterable[Surveyed], shape: Shape, classes: tuple[str, ...]
) -> None:
    pixels = math.prod(shape)  # bytes
    check_samples(f"images of {_sides(shape[1:])}", pixels, SET_SIZE, examples.length)
    header = Header(_kind(examples.length, shape), shape, classes, default_augment(shape))
    size = encoded if header.kind == "encoded" else examples.length * pixels
    write_store(target, header, _blocks(examples, parts, header), size)


def _kind(length: int, shape: Shape) -> Literal["pixels", "encoded"]:
    decoded = length * math.prod(shape)  # bytes
    return "pixels" if decoded <= DECODED_BYTES else "encoded"


def _blocks(examples: Examples, parts: Iterable[Surveyed], header: Header) -> Iterator[Block]:
    stride = 1 + examples.length // SAMPLED  # one in so many gives an encoded store's statistics
    for start, images, y, _ in parts:
        name = _shifted(examples.name, start)
        check_labels(y, len(header.classes), name)
        if header.kind == "pixels":
            x = decode_all(images, header.shape, name)
            yield Block(x, y.astype(np.int64), sample=x)
        else:
            name = _shifted(examples.name, start, stride)
            sample = decode_all(images[::stride], header.shape, name)
            yield Block(images, y.astype(np.int64), sample)


def _shifted(name: Name, start: int, stride: int = 1) -> Name:
    return lambda i: name(start + i * stride)


@dataclass(frozen=True)
class _Decoded:
    """Gather by decoding; it pickles with its store, as a path."""

    store: Stored

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        def name(i: int) -> str:
            return f"image {indices[i]} of {self.store.name}"

        return decode_all(self.store.encoded(indices), self.store.header.shape, name)


def _sides(sides: Shape) -> str:
    return "×".join(map(str, sides))
