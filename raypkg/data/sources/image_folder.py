"""Folders of image files: ``PATH/train/<class>/*.jpg`` and ``PATH/test/<class>/*.jpg``, or ``PATH/<class>/*.jpg``."""

import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.core.memory import check_read
from raypkg.data.files import READERS, Place, fetched, files_below, open_input, place_of, split_rows
from raypkg.data.split import Split
from raypkg.data.store.cache import Cache, fingerprint, store_path
from raypkg.data.store.images import Side, open_images

from . import dataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
FOLDERS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
LIKE_A_SPLIT = re.compile(r"(train|test|val|valid|dev|eval)(ing|ation|s|[ _-]?set)?")
READ_AT_ONCE = 256


@dataset("folder")
def load(
    root: str, *, split: str, cache: Cache, size: Side = 0, test: Annotated[float, Field(ge=0, lt=1)] = 0.2
) -> Split:
    """Image files in one folder a class: PATH/train/<class>/… and PATH/test (val, valid, validation)/<class>/….

    Without a folder of test images the share ``test`` of the others is the test split, drawn by their number alone;
    these may then be in PATH/<class>/…. A class may keep its files in folders of its own, not in links. Class numbers
    follow the sorted names of train's.

    Raises:
        UserError: a missing or empty folder, a class of test unknown to train, broken links, files that are unreadable
            or no images, or images of several sizes while ``size`` is 0.
    """
    place = place_of(root)
    if not place.exists():
        raise UserError(f"folder {root!r} does not exist")
    found = {
        name: next((place / each for each in spellings if (place / each).is_dir()), None)
        for name, spellings in FOLDERS.items()
    }
    visible = {each.name for each in place.iterdir() if each.is_dir() and each.name[0] != "."} if place.is_dir() else ()
    astray = {each for each in visible if found["train"] or LIKE_A_SPLIT.fullmatch(each.casefold())} - {"train"}
    for name, spellings in FOLDERS.items():
        if not found[name] and (astray or not visible):  # a split spelled otherwise is not taken for a class
            raise UserError(f"folder {root!r} has no {name} split: none of the folders {', '.join(spellings)}")
    folder = found["train"] or place
    classes = tuple(sorted(_class_folders(folder)))
    images = {"train": images_of(folder, classes)}
    drawn = {}
    if found["test"]:
        images["test"] = images_of(found["test"], classes)
    else:
        everything, drawn = images["train"], {"test": test}
        for name in FOLDERS:
            rows = split_rows(dict.fromkeys(FOLDERS, folder), name, everything.length, test)
            files_of_split = [everything.files[row] for row in rows]
            images[name] = ImageFiles(classes, files_of_split, everything.labels[rows])
    files = {name: each.files for name, each in images.items()}
    key = fingerprint(files["train"] + files["test"], root=root, size=size, **drawn)
    return open_images(split, partial(store_path, cache, place.resolve().name, key), images.__getitem__, files, size)


def _class_folders(folder: Place) -> dict[str, Place]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    classes = {path.name: path for path in visible if path.is_dir()}
    if lost := [str(path) for path in visible if not path.exists()]:
        raise UserError(f"{lost[0]!r} is no folder: a link that leads nowhere")
    if not classes:
        raise UserError(f"folder {str(folder)!r} holds no class folders")
    for name in classes:
        try:
            name.encode()
        except UnicodeEncodeError:  # bytes of another encoding, which Python keeps as surrogates
            raise UserError(f"folder {str(folder)!r} has the class {name!r}, whose name is not UTF-8") from None
    return classes


class ImageFiles(NamedTuple):
    """The image files of one split, class by class."""

    classes: tuple[str, ...]
    files: list[Place]
    labels: np.ndarray  # int64 [n]

    @property
    def length(self) -> int:
        """The number of images."""
        return len(self.files)

    def name(self, i: int) -> str:
        """Describe the i-th image for errors."""
        return str(self.files[i])

    def batches(self, start: int = 0) -> Iterator[tuple[list[bytes], np.ndarray]]:
        """Yield encoded images and labels from the image ``start`` on, a bounded number at a time."""
        contents = fetched(content, self.files[start:])
        for first in range(start, len(self.files), READ_AT_ONCE):
            labels = self.labels[first : first + READ_AT_ONCE]
            yield list(islice(contents, len(labels))), labels


def images_of(folder: Place, classes: tuple[str, ...]) -> ImageFiles:
    """List the images of a split; refuse a class unknown to train or without images."""
    found: list[Place] = []
    labels: list[int] = []
    for name, path in sorted(_class_folders(folder).items()):
        if name not in classes:
            raise UserError(f"class {name!r} of {str(folder)!r} is not among the {len(classes)} classes of train")
        files = files_below(path, SUFFIXES)
        if not files:
            raise UserError(f"class folder {str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))})")
        found += files
        labels += [classes.index(name)] * len(files)
    return ImageFiles(classes, found, np.array(labels, np.int64))


def content(file: Place) -> bytes:
    """Read an image file within the limit of memory."""
    try:
        with open_input(file) as stream:
            check_read(f"image {str(file)!r}, one of {READERS} at once", READERS * stream.size())
            return stream.read()
    except OSError as error:
        raise UserError(f"image {str(file)!r} cannot be read: {error.strerror or error}") from None
