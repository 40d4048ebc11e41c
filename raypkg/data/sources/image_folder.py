"""Folders of image files: ``PATH/train/<class>/*.jpg`` and ``PATH/test/<class>/*.jpg``."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from raypkg.core.errors import UserError
from raypkg.data.split import Split
from raypkg.data.store.cache import fingerprint, store_path
from raypkg.data.store.images import Examples, ImageSource, Side

from . import dataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
FOLDERS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
READ_AT_ONCE = 256

Labelled = list[tuple[Path, int]]  # image files with the numbers of their classes


@dataset("folder")
def load(
    root: str,
    *,
    split: str,
    cache: Path | None,
    size: Side = 0,
) -> Split:
    """Image files in one folder a class: PATH/train/<class>/… and PATH/test (val, valid, validation)/<class>/….

    A class may keep its files in folders of its own. Class numbers follow the sorted names of train's folders.

    Raises:
        UserError: a missing or empty folder, a class of test unknown to train, links to nowhere, files that cannot be
            read or are no images, or images of several sizes while ``size`` is 0.
    """
    folders = {name: _folder(Path(root), name) for name in FOLDERS}
    classes = tuple(sorted(_class_folders(folders["train"])))
    files = {name: _labelled(folder, classes) for name, folder in folders.items()}
    paths = [file for file, _ in files["train"] + files["test"]]
    key = fingerprint(paths, root=root, size=size)

    def examples(name: str) -> Examples:
        return _examples(files[name], classes)

    path = partial(store_path, cache, Path(root).resolve().name, key)
    return ImageSource(path, examples, size).split(split)


def _folder(root: Path, split: str) -> Path:
    names = FOLDERS[split]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        tried = ", ".join(names)
        raise UserError(f"folder {str(root)!r} has no {split} split: none of the folders {tried}")
    return folder


def _class_folders(folder: Path) -> dict[str, Path]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    classes = {path.name: path for path in visible if path.is_dir()}
    if not classes:
        raise UserError(f"folder {str(folder)!r} holds no class folders")
    for name in classes:
        _check_text(name, folder)
    return classes


def _check_text(name: str, folder: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding, which Python keeps as surrogates
        raise UserError(f"folder {str(folder)!r} has the class {name!r}, whose name is not UTF-8") from None


def _labelled(folder: Path, classes: tuple[str, ...]) -> Labelled:
    """List the image files of a split with their labels, class by class."""
    files = []
    for name, path in sorted(_class_folders(folder).items()):
        if name not in classes:
            raise UserError(f"class {name!r} of {str(folder)!r} is not among the {len(classes)} classes of train")
        label = classes.index(name)
        files += [(file, label) for file in _images(path)]
    return files


def _images(folder: Path) -> list[Path]:
    named = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    files = []
    for path in sorted(named):
        if path.is_file():
            files.append(path)
        elif not path.is_dir():  # what a folder of such a name holds is listed by itself
            raise UserError(f"image {str(path)!r} is no file: a link that leads nowhere, or a device")
    if not files:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UserError(f"class folder {str(folder)!r} holds no images ({suffixes})")
    return files


def _examples(files: Labelled, classes: tuple[str, ...]) -> Examples:
    def name(i: int) -> str:
        return str(files[i][0])

    return Examples(len(files), classes, partial(_batches, files), name)


def _batches(files: Labelled) -> Iterator[tuple[list[bytes], np.ndarray]]:
    for start in range(0, len(files), READ_AT_ONCE):
        batch = files[start : start + READ_AT_ONCE]
        images = [_content(file) for file, _ in batch]
        labels = [label for _, label in batch]
        yield images, np.array(labels, np.int64)


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"image {str(file)!r} cannot be read: {error.strerror}") from None
