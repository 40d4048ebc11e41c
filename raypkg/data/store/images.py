"""From a stream of encoded images to a Split.

A set that fits ``DECODED_BYTES`` when decoded is decoded once, into a store of pixels. A larger one is stored encoded
and decoded on every read.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np

from raypkg.core.errors import UserError
from raypkg.data.split import Split, check_labels

from .arrow import Block, Header, Store, write
from .cache import cached
from .decode import Name, Shape, decode_all, header

DECODED_BYTES = 2 << 30
SAMPLED = 4096  # about so many images of an encoded store give its statistics


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
    """

    path: Callable[[str], Path]
    examples: Callable[[str], Examples]
    size: int

    def split(self, name: str) -> Split:
        """Return a split over its store, which is built if it is missing."""
        store = cached(self.path(name), partial(self._build, name))
        return store.as_split(_Decoded(store) if store.header.kind == "encoded" else None)

    def _build(self, name: str, target: Path) -> None:
        examples = self.examples(name)
        if not examples.length:
            raise UserError(f"the {name} split holds no images")
        shape, classes = survey(examples, self.size), examples.classes
        if name != "train":  # the train split decides on channels and class names
            train = self.split("train")
            if shape[1:] != train.shape[1:]:
                raise UserError(
                    f"{name} images are {_sides(shape)}, train images {_sides(train.shape)}: set option size"
                )
            shape, classes = train.shape, train.classes
        fits = examples.length * int(np.prod(shape)) <= DECODED_BYTES
        kind: Literal["pixels", "encoded"] = "pixels" if fits else "encoded"
        augment = ("crop",) if shape[0] == 1 else ("crop", "flip")
        write(target, Header(kind, shape, classes, augment), _blocks(examples, kind, shape, len(classes)))


def survey(examples: Examples, size: int) -> Shape:
    """Read every header and return the shape (C, H, W): one channel if every image is grey, else three.

    Raises:
        UserError: images of several sizes while ``size`` is 0, or something that is no image.
    """
    position, channels, first = count(), 1, None
    for images, _ in examples.batches():
        for data, i in zip(images, position, strict=False):
            seen = header(data, examples.name, i)
            channels = channels if seen.grey else 3
            shape = (channels, size, size) if size else (channels, seen.height, seen.width)
            first = first or shape
            if shape[1:] != first[1:]:
                raise UserError(
                    f"images of several sizes, such as {_sides(first)} and {_sides(shape)}: set option size"
                )
    assert first, "there is at least one image"
    return channels, *first[1:]


def _blocks(examples: Examples, kind: str, shape: Shape, num_classes: int) -> Iterator[Block]:
    start, stride = 0, 1 + examples.length // SAMPLED
    for images, y in examples.batches():
        name = _shifted(examples.name, start)
        check_labels(y, num_classes, name)
        if kind == "pixels":
            x = decode_all(images, shape, name)
            yield Block(x, y, x)
        else:
            yield Block(images, y, decode_all(images[::stride], shape, _shifted(examples.name, start, stride)))
        start += len(images)


def _shifted(name: Name, start: int, stride: int = 1) -> Name:
    return lambda i: name(start + i * stride)


@dataclass(frozen=True)
class _Decoded:
    """Gather by decoding; it pickles with its store, as a path."""

    store: Store

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        images = [self.store.encoded(i) for i in indices.tolist()]
        return decode_all(images, self.store.header.shape, lambda i: f"image {indices[i]} of {self.store.path}")


def _sides(shape: Shape) -> str:
    return "×".join(map(str, shape[1:]))
