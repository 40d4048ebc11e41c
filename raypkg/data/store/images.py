"""From a stream of encoded images to a Split.

A set that fits ``DECODED_BYTES`` when decoded is decoded once, into a store of pixels. A larger one is stored encoded
and decoded on every read.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.data.augment import default_augment
from raypkg.data.files import Place, identity_of
from raypkg.data.memory import check_samples
from raypkg.data.split import Split, check_labels

from .arrow import Block, Header, Store, write
from .cache import cached, check_fits
from .decode import ImageHeader, Name, Shape, decode_all, read_header

DECODED_BYTES = (2 << 30) - 1  # the most that Arrow allows one sample as well
SAMPLED = 4096  # about so many images of an encoded store give its statistics
SET_SIZE = "set option size, such as --set dataset.options.size=224 (--set size=224 for effray data)"

Side = Annotated[int, Field(ge=0, le=1 << 16)]  # of an image, in pixels; 0 = its own


@dataclass(frozen=True)
class Examples:
    """The encoded images of one split in a stream of batches; ``name(i)`` tells the user where the i-th came from."""

    length: int
    classes: tuple[str, ...]
    batches: Callable[[], Iterator[tuple[list[bytes], np.ndarray]]]
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

    path: Callable[[str], Path]
    examples: Callable[[str], Examples]
    size: int
    files: Mapping[str, Sequence[Place]]

    def split(self, name: str) -> Split:
        """Return a split over its store, which is built if it is missing."""
        store = cached(self.path(name), partial(self._build, name), self.files[name])
        take = _Decoded(store) if store.header.kind == "encoded" else None
        return store.as_split(take)

    def _build(self, name: str, target: Path) -> None:
        examples = self.examples(name)
        if not examples.length:
            raise UserError(f"the {name} split holds no images")
        shape = survey(examples, self.size)
        pixels = math.prod(shape)  # bytes
        check_samples(f"images of {_sides(shape[1:])}", pixels, SET_SIZE, examples.length)
        classes = examples.classes
        if name != "train":  # the train split decides on channels and class names
            train = self.split("train")
            if shape[1:] != train.shape[1:]:
                sides = _sides(shape[1:])
                raise UserError(f"{name} images are {sides}, train images {_sides(train.shape[1:])}: {SET_SIZE}")
            shape = train.shape
            classes = train.classes
        header = Header(_kind(examples.length, shape), shape, classes, default_augment(shape))
        encoded = sum(identity_of(file).size for file in self.files[name])
        check_fits(target, encoded if header.kind == "encoded" else examples.length * pixels)
        write(target, header, _blocks(examples, header))


def _kind(length: int, shape: Shape) -> Literal["pixels", "encoded"]:
    decoded = length * math.prod(shape)  # bytes
    return "pixels" if decoded <= DECODED_BYTES else "encoded"


def survey(examples: Examples, size: int) -> Shape:
    """Read every header and return the shape (C, H, W): one channel if every image is grey, else three.

    Raises:
        UserError: images of several sizes while ``size`` is 0, or something that is no image.
    """
    channels = 1
    first: Shape = ()  # height and width of the first image
    for image in _headers(examples):
        if not image.grey:
            channels = 3
        own = (size, size) if size else (image.height, image.width)
        first = first or own
        if own != first:
            raise UserError(f"images of several sizes, such as {_sides(first)} and {_sides(own)}: {SET_SIZE}")
    assert first, "there is at least one image"
    return channels, *first


def _headers(examples: Examples) -> Iterator[ImageHeader]:
    i = 0
    for images, _ in examples.batches():
        for data in images:
            yield read_header(data, examples.name, i)
            i += 1


def _blocks(examples: Examples, header: Header) -> Iterator[Block]:
    start = 0
    stride = 1 + examples.length // SAMPLED  # one in so many gives an encoded store's statistics
    for images, y in examples.batches():
        name = _shifted(examples.name, start)
        check_labels(y, len(header.classes), name)
        if header.kind == "pixels":
            x = decode_all(images, header.shape, name)
            yield Block(x, y.astype(np.int64), sample=x)
        else:
            name = _shifted(examples.name, start, stride)
            sample = decode_all(images[::stride], header.shape, name)
            yield Block(images, y.astype(np.int64), sample)
        start += len(images)


def _shifted(name: Name, start: int, stride: int = 1) -> Name:
    return lambda i: name(start + i * stride)


@dataclass(frozen=True)
class _Decoded:
    """Gather by decoding; it pickles with its store, as a path."""

    store: Store

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        def name(i: int) -> str:
            return f"image {indices[i]} of {self.store.path}"

        images = [self.store.encoded(i) for i in indices.tolist()]
        return decode_all(images, self.store.header.shape, name)


def _sides(sides: Shape) -> str:
    return "×".join(map(str, sides))
