"""Folders of image files: ``PATH/train/<class>/*.jpg`` and ``PATH/test/<class>/*.jpg``."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from raypkg.core.errors import UserError
from raypkg.data.split import Split
from raypkg.data.store.cache import cache_folder, fingerprint
from raypkg.data.store.images import Examples, ImageSource

from . import dataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
FOLDERS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
READ_AT_ONCE = 256


@dataset("folder")
def load(root: str, *, split: str, cache: Path | None, size: Annotated[int, Field(ge=0)] = 0) -> Split:
    """Image files in one folder a class: PATH/train/<class>/… and PATH/test (val, valid, validation)/<class>/….

    A class may keep its files in folders of its own. Class numbers follow the sorted names of train's folders.

    Raises:
        UserError: a missing or empty folder, a class of test unknown to train, files that are no images, or images of
            several sizes while ``size`` is 0.
    """
    folders = {name: _folder(Path(root), name) for name in FOLDERS}
    classes = tuple(sorted(_classes(folders["train"])))
    files = {name: _files(folders[name], classes) for name in FOLDERS}
    key = fingerprint((file for found in files.values() for file, _ in found), root=root, size=size)
    stem = f"{cache_folder(cache)}/{Path(root).resolve().name}"
    source = ImageSource(
        lambda name: Path(f"{stem}-{name}-{key}.arrow"), lambda name: _examples(files[name], classes), size
    )
    return source.split(split)


def _folder(root: Path, split: str) -> Path:
    found = [root / name for name in FOLDERS[split] if (root / name).is_dir()]
    if not found:
        raise UserError(f"folder {str(root)!r} has no {split} split: none of the folders {', '.join(FOLDERS[split])}")
    return found[0]


def _classes(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if not found:
        raise UserError(f"folder {str(folder)!r} holds no class folders")
    return found


def _files(folder: Path, classes: tuple[str, ...]) -> list[tuple[Path, int]]:
    """List the image files of a split with their labels, class by class."""
    found = []
    for name, path in sorted(_classes(folder).items()):
        if name not in classes:
            raise UserError(f"class {name!r} of {str(folder)!r} is not among the {len(classes)} classes of train")
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"class folder {str(path)!r} holds no images ({', '.join(sorted(SUFFIXES))})")
        found += [(file, classes.index(name)) for file in files]
    return found


def _examples(files: list[tuple[Path, int]], classes: tuple[str, ...]) -> Examples:
    return Examples(len(files), classes, partial(_batches, files), lambda i: str(files[i][0]))


def _batches(files: list[tuple[Path, int]]) -> Iterator[tuple[list[bytes], np.ndarray]]:
    for start in range(0, len(files), READ_AT_ONCE):
        some = files[start : start + READ_AT_ONCE]
        yield [file.read_bytes() for file, _ in some], np.array([label for _, label in some], np.int64)
