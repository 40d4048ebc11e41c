"""From a stream of encoded images to a Split.

A set that fits ``DECODED_BYTES`` when decoded is decoded once, into a store of pixels. A larger one is stored encoded
and decoded on every read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from .cache import Target, begun_header, cached, write_store_from
from .decode import Name, Shape, decode_all, read_header
from .stored import Block, Header, Stored

DECODED_BYTES = (2 << 30) - 1  # the most that Arrow allows one sample as well
SAMPLED = 4096  # about so many images of an encoded store give its statistics
SET_SIZE = "set option size, such as --set dataset.options.size=224 (--set size=224 for effray data)"

Side = Annotated[int, Field(ge=0, le=1 << 16)]  # of an image, in pixels; 0 = its own

Encoded = tuple[list[bytes], np.ndarray]  # images and their labels


@dataclass(frozen=True)
class Examples:
    """The encoded images of one split in a stream of batches; ``name(i)`` tells the user where the i-th came from.

    ``batches(start)`` begins at an image that is the first of a batch.
    """

    length: int
    classes: tuple[str, ...]
    batches: Callable[[int], Iterator[Encoded]]
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
        found, images = self._opened(examples, target)
        if name != "train":
            train = self.split("train")  # it decides on channels and class names
            if found[1:] != train.shape[1:]:
                sides = _sides(found[1:])
                raise UserError(f"{name} images are {sides}, train images {_sides(train.shape[1:])}: {SET_SIZE}")
            write_to(images, train.shape, train.classes)
            return
        try:
            write_to(partial(_with_channels, images, found[0]), found, examples.classes)
        except ColourAfterGrey:
            colour = (3, *found[1:])
            again = partial(surveyed, examples, self.size, sides=found[1:])
            write_to(again, colour, examples.classes)

    def _opened(self, examples: Examples, target: Target) -> tuple[Shape, "Images"]:
        """Return the shape of the first images, as an import that was killed found it or as they are, and all."""
        begun = begun_header(target)
        if begun:
            return begun.shape, partial(surveyed, examples, self.size, sides=begun.shape[1:])
        rest = surveyed(examples, self.size)
        first = next(rest)

        def images(start: int) -> Iterator[Surveyed]:
            if start:  # another process has just written the first
                return surveyed(examples, self.size, start, first.shape[1:])
            return chain([first], rest)

        return first.shape, images


class Surveyed(NamedTuple):
    """Encoded images on their way into a store."""

    start: int  # how many came before
    images: list[bytes]
    y: np.ndarray  # [m]
    shape: Shape  # (C, H, W), with one channel if all of these images are grey


Images = Callable[[int], Iterator[Surveyed]]  # from one on


class ColourAfterGrey(Exception):
    """An image has colour, and those that came before it had none."""


def surveyed(examples: Examples, size: int, start: int = 0, sides: Shape = ()) -> Iterator[Surveyed]:
    """Stream the images of a split and read every header.

    Args:
        examples: of the split.
        size: side to which they are to be resized; 0 = they keep their own.
        start: the image to begin at, which is the first of a batch.
        sides: height and width of those before it.

    Raises:
        UserError: images of several sizes while ``size`` is 0, or something that is no image.
    """
    for images, y in examples.batches(start):
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


def _with_channels(images: Images, channels: int, start: int) -> Iterator[Surveyed]:
    for part in images(start):
        if part.shape[0] > channels:
            raise ColourAfterGrey
        yield part


def _write(
    target: Target, examples: Examples, encoded: int, images: Images, shape: Shape, classes: tuple[str, ...]
) -> None:
    pixels = math.prod(shape)  # bytes
    check_samples(f"images of {_sides(shape[1:])}", pixels, SET_SIZE, examples.length)
    header = Header(_kind(examples.length, shape), shape, classes, default_augment(shape))
    size = encoded if header.kind == "encoded" else examples.length * pixels
    write_store_from(target, header, partial(_blocks, examples, images, header), size)


def _kind(length: int, shape: Shape) -> Literal["pixels", "encoded"]:
    decoded = length * math.prod(shape)  # bytes
    return "pixels" if decoded <= DECODED_BYTES else "encoded"


def _blocks(examples: Examples, source: Images, header: Header, first: int) -> Iterator[Block]:
    stride = 1 + examples.length // SAMPLED  # one in so many gives an encoded store's statistics
    for start, images, y, _ in source(first):
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
