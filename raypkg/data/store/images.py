"""From encoded images to a Split: headers, the import into a store, and decoding.

A set of at most ``DECODED_BYTES`` of pixels is decoded once, into a store of pixels. A larger one is stored encoded and
decoded on every read, by as many threads as torch uses: the worker's CPUs.
"""

import io
import math
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import chain
from typing import Annotated, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageOps
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.memory import check_samples, read_limit
from raypkg.data.augment import default_augment
from raypkg.data.files import Place, fetched, identity_of
from raypkg.data.split import Split, check_labels

from .arrow import Block, Header, Stored
from .cache import Target, cached, write_store
from .streamed import begun_header

DECODED_BYTES = (2 << 30) - 1  # also Arrow's limit for one sample
SAMPLED = 4096  # images of an encoded store that contribute to its statistics, approximately
SET_SIZE = "set option size, such as --set dataset.options.size=224 (--set size=224 for effray data)"

SIXTEEN_BITS = {"I", "I;16", "I;16B"}
GREY = {"1", "L", "LA", *SIXTEEN_BITS}  # Pillow's modes without colour
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no format that runs another program, such as EPS
TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
DAMAGED = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, *TOO_LARGE)  # raised by Pillow for damaged files
Image.MAX_IMAGE_PIXELS = read_limit() // 48  # Pillow's own default, unless EFFRAY_MEMORY is set
DEEP = "its pixels are not of 8 or 16 bits"
RUNS = 4  # runs of images per thread: a thread with quick ones takes another run

# A JPEG file is a sequence of segments: FF, a marker, and a length that includes itself (ITU-T T.81, B.1.1).
JPEG = b"\xff\xd8\xff"
MARKERS = range(0xC0, 0xFF)
FRAMES = {0xC0, 0xC1, 0xC2}  # segments with the size, of the codings that Pillow decodes
SCAN = 0xDA  # the segment before the pixels
FULL_SIZE = 1  # of the decoder's scales 1/1, 1/2, 1/4 and 1/8

Side = Annotated[int, Field(ge=0, le=1 << 16)]  # of an image, in pixels; 0 = its own
Name = Callable[[int], str]  # describes the i-th image in errors
Shape = tuple[int, ...]
ImageHeader = tuple[int, int, bool]  # height, width, whether it is grey


class Examples(Protocol):
    """The encoded images of one split, in a stream of batches."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""

    @property
    def length(self) -> int:
        """The number of images."""

    def batches(self, start: int) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Yield images and labels from the image ``start`` on, which must be the first of a batch."""

    def name(self, i: int) -> str:
        """Describe the i-th image for errors."""


class Surveyed(NamedTuple):
    """A batch of encoded images whose headers were read."""

    start: int  # number of images before it
    images: list[bytes]
    y: np.ndarray  # [m]
    shape: Shape  # (C, H, W), C = 1 if all of these images are grey


class ColourAfterGrey(Exception):
    """An image has colour, and all before it were grey."""


# Import


def open_images(
    split: str,
    store: Callable[[str], Target],
    examples: Callable[[str], Examples],
    files: Mapping[str, Sequence[Place]],
    size: int,
) -> Split:
    """Open the store of a split of encoded images, importing it first if it is missing.

    ``store`` and ``examples`` return the location and the images of a split; the latter is called only for an import.
    Images are resized on their shorter side to ``size`` and centre cropped; 0 keeps their own single size.
    """

    def build(target: Target) -> None:
        source = examples(split)
        if not source.length:
            raise UserError(f"the {split} split holds no images")
        interrupted = begun_header(target)
        rest = surveyed(source, size)
        first = [] if interrupted else [next(rest)]
        shape = interrupted.shape if interrupted else first[0].shape
        if split == "train":
            classes = source.classes
        else:  # the train split determines channels and class names
            train = open_images("train", store, examples, files, size)
            if shape[1:] != train.shape[1:]:
                ours, theirs = (_sides(each[1:]) for each in (shape, train.shape))
                raise UserError(f"{split} images are {ours}, train images {theirs}: {SET_SIZE}")
            shape, classes = train.shape, train.classes

        def survey(start: int) -> Iterator[Surveyed]:
            # An import that another process has begun meanwhile starts later.
            is_whole = first and not start
            for batch in chain(first, rest) if is_whole else surveyed(source, size, start, shape[1:]):
                if split == "train" and batch.shape[0] > shape[0]:
                    raise ColourAfterGrey
                yield batch

        encoded = sum(size for _, size, _ in map(identity_of, files[split]))
        try:
            _write(target, source, encoded, survey, shape, classes)
        except ColourAfterGrey:
            first, shape = [], (3, *shape[1:])
            _write(target, source, encoded, survey, shape, classes)

    opened = cached(store(split), build, files[split])
    return opened.as_split(_decoded if opened.header.kind == "encoded" else None)


def surveyed(source: Examples, size: int, start: int = 0, sides: Shape = ()) -> Iterator[Surveyed]:
    """Read every header of a stream of images, and yield the images.

    They start at the image ``start``, the first of a batch; ``sides`` is the height and width of those before it.
    """
    for images, y in source.batches(start):
        channels = 1
        for i, data in enumerate(images):
            height, width, is_grey = read_header(data, source.name, start + i)
            own = (size, size) if size else (height, width)
            sides = sides or own
            if own != sides:
                raise UserError(f"images of several sizes, such as {_sides(sides)} and {_sides(own)}: {SET_SIZE}")
            channels = channels if is_grey else 3
        if images:
            yield Surveyed(start, images, y, (channels, *sides))
        start += len(images)


def _write(
    target: Target,
    source: Examples,
    encoded: int,
    survey: Callable[[int], Iterator[Surveyed]],
    shape: Shape,
    classes: tuple[str, ...],
) -> None:
    """Write a store of pixels, or of ``encoded`` bytes of images."""
    pixels = math.prod(shape)  # bytes of an image
    check_samples(f"images of {_sides(shape[1:])}", pixels, SET_SIZE, source.length)
    is_decoded = source.length * pixels <= DECODED_BYTES
    # One of this many images contributes to an encoded store's statistics.
    stride = 1 if is_decoded else 1 + source.length // SAMPLED

    def blocks(first: int) -> Iterator[Block]:
        def block(batch: Surveyed) -> Block:
            start, images, y, _ = batch
            check_labels(y, len(classes), _shifted(source.name, start))
            sample = decode_all(images[::stride], shape, _shifted(source.name, start, stride))
            return Block(sample if is_decoded else images, y.astype(np.int64), sample)

        return fetched(block, survey(first), threads=1)  # the next block is decoded while one is written

    header = Header("pixels" if is_decoded else "encoded", shape, classes, default_augment(shape))
    write_store(target, header, blocks, source.length * pixels if is_decoded else encoded)


def _decoded(store: Stored, indices: np.ndarray) -> np.ndarray:
    """Gather images of an encoded store by decoding them, uint8 [b, H, W, C]."""
    return decode_all(store.encoded(indices), store.header.shape, lambda i: f"image {indices[i]} of {store.name}")


def _shifted(name: Name, start: int, stride: int = 1) -> Name:
    return lambda i: name(start + i * stride)


def _sides(sides: Shape) -> str:
    return "×".join(map(str, sides))


# Headers


def read_header(data: bytes, name: Name, i: int) -> ImageHeader:
    """Read the header of the i-th encoded image; ``name(i)`` describes it in errors."""
    if header := jpeg_header(data):
        return header
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                return image.height, image.width, image.mode in GREY
    except TOO_LARGE as error:
        raise UserError(f"{name(i)} is too large to decode: {error} EFFRAY_MEMORY raises the limit") from None
    except DAMAGED:
        raise UserError(f"{name(i)} does not decode: it is damaged or no image, or {DEEP}") from None


def jpeg_header(data: bytes) -> ImageHeader | None:
    """Read the header of an ordinary JPEG file, in a tenth of Pillow's time; None leaves the file to Pillow.

    Other segments, such as tables of the decoder, are not checked.
    """
    if data[:3] != JPEG:
        return None
    header = None
    start = 2
    while start + 10 <= len(data) and data[start] == 0xFF and data[start + 1] in MARKERS:
        marker = data[start + 1]
        if marker == SCAN:
            return header
        (length,) = struct.unpack_from(">H", data, start + 2)
        if marker in FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", data, start + 4)
            is_small = 0 < height * width <= (Image.MAX_IMAGE_PIXELS or 0)
            if not is_small or bits != 8 or channels not in (1, 3):
                return None
            header = height, width, channels == 1
        start += 2 + length
    return None


# Decoding


def decode(data: bytes, shape: Shape) -> np.ndarray:
    """Decode one image to uint8 [H, W, C]: shorter side resized and centre cropped if its size differs.

    A JPEG at least twice as large is decoded at a half, a quarter or an eighth of its size, not smaller than needed,
    and resized from there. This is several times as fast, but differs from decoding it in full: the decoder keeps the
    low frequencies of each block of pixels, while a resize weights the pixels with a triangle. Images of Tiny ImageNet,
    halved, differ by 5 of 255 on average.
    """
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    # Arrow reads a mapped file without Python's lock, so the training thread does not wait for the disk.
    content = pa.BufferReader(data).read()
    if jpeg_header(content) == (height, width, channels == 1):
        # Pillow's decoder alone: its reading of the file's other segments takes as long for a small image.
        whole = Image.frombytes(mode, (width, height), content, "jpeg", mode, "", FULL_SIZE, 0)
        return np.asarray(whole).reshape(height, width, channels)
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        image.draft(mode, (width, height))
        return pixels_of(image, shape)


def pixels_of(image: Image.Image, shape: Shape) -> np.ndarray:
    """Convert one image of Pillow to uint8 [H, W, C]: shorter side resized and centre cropped if its size differs."""
    channels, height, width = shape
    mode = "L" if channels == 1 else "RGB"
    if image.mode in SIXTEEN_BITS:  # keep the upper byte; Pillow's own conversion clips to white
        upper = np.asarray(image) >> 8
        if upper.min() < 0 or upper.max() > 255:
            raise ValueError(DEEP)
        image = Image.fromarray(upper.astype(np.uint8))
    elif image.mode == "F":  # of an unknown range
        raise ValueError(DEEP)
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(height, width, channels)


def decode_all(images: Sequence[bytes], shape: Shape, name: Name) -> np.ndarray:
    """Decode images to uint8 [b, H, W, C]; ``name(i)`` describes the i-th in errors."""
    channels, height, width = shape
    out = np.empty((len(images), height, width, channels), np.uint8)

    # Threads take runs of images: handing out single ones would cost as much as decoding small ones.
    def fill(start: int, stop: int) -> None:
        for i in range(start, stop):
            try:
                out[i] = decode(images[i], shape)
            except DAMAGED:
                raise UserError(f"{name(i)} does not decode: it is damaged or no image, or {DEEP}") from None

    threads = torch.get_num_threads()
    bounds = np.linspace(0, len(images), RUNS * threads + 1).astype(int).tolist()
    list(decoding_threads(threads).map(fill, bounds[:-1], bounds[1:]))  # waits, and raises the error of a thread
    return out


@cache
def decoding_threads(count: int) -> ThreadPoolExecutor:
    """Return the process's pool of ``count`` threads."""
    return ThreadPoolExecutor(count, thread_name_prefix="decode")


os.register_at_fork(after_in_child=decoding_threads.cache_clear)  # a fork has none of the threads
