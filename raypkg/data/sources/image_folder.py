"""Folders of image files: ``PATH/train/<class>/*.jpg`` and ``PATH/test/<class>/*.jpg``."""

from collections.abc import Iterator
from functools import partial
from itertools import islice

import numpy as np

from raypkg.core.errors import UserError
from raypkg.data.files import Place, files_below, open_input, place_of
from raypkg.data.split import Split
from raypkg.data.store.cache import Cache, fingerprint, store_path
from raypkg.data.store.fetching import fetched
from raypkg.data.store.images import Examples, ImageSource, Side

from . import dataset

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"}
FOLDERS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}
READ_AT_ONCE = 256

Labelled = list[tuple[Place, int]]  # image files with the numbers of their classes


@dataset("folder")
def load(
    root: str,
    *,
    split: str,
    cache: Cache,
    size: Side = 0,
) -> Split:
    """Image files in one folder a class: PATH/train/<class>/… and PATH/test (val, valid, validation)/<class>/….

    A class may keep its files in folders of its own. Class numbers follow the sorted names of train's folders.

    Raises:
        UserError: a missing or empty folder, a class of test unknown to train, links to nowhere, files that cannot be
            read or are no images, or images of several sizes while ``size`` is 0.
    """
    place = place_of(root)
    folders = {name: _folder(place, name) for name in FOLDERS}
    classes = tuple(sorted(_class_folders(folders["train"])))
    labelled = {name: _labelled(folder, classes) for name, folder in folders.items()}
    files = {name: [file for file, _ in pairs] for name, pairs in labelled.items()}
    key = fingerprint(files["train"] + files["test"], root=root, size=size)

    def examples(name: str) -> Examples:
        return _examples(labelled[name], classes)

    path = partial(store_path, cache, place.resolve().name, key)
    return ImageSource(path, examples, size, files).split(split)


def _folder(root: Place, split: str) -> Place:
    names = FOLDERS[split]
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        tried = ", ".join(names)
        raise UserError(f"folder {str(root)!r} has no {split} split: none of the folders {tried}")
    return folder


def _class_folders(folder: Place) -> dict[str, Place]:
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    classes = {path.name: path for path in visible if path.is_dir()}
    if not classes:
        raise UserError(f"folder {str(folder)!r} holds no class folders")
    for name in classes:
        _check_text(name, folder)
    return classes


def _check_text(name: str, folder: Place) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of another encoding, which Python keeps as surrogates
        raise UserError(f"folder {str(folder)!r} has the class {name!r}, whose name is not UTF-8") from None


def _labelled(folder: Place, classes: tuple[str, ...]) -> Labelled:
    """List the image files of a split with their labels, class by class."""
    files = []
    for name, path in sorted(_class_folders(folder).items()):
        if name not in classes:
            raise UserError(f"class {name!r} of {str(folder)!r} is not among the {len(classes)} classes of train")
        label = classes.index(name)
        files += [(file, label) for file in _images(path)]
    return files


def _images(folder: Place) -> list[Place]:
    named = [path for path in files_below(folder) if path.suffix.lower() in SUFFIXES]
    files = []
    for path in named:
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


def _batches(files: Labelled, start: int) -> Iterator[tuple[list[bytes], np.ndarray]]:
    """Stream encoded images and labels from an image on, which is the first of a batch."""
    contents = fetched(_content, (file for file, _ in files[start:]))
    for first in range(start, len(files), READ_AT_ONCE):
        labels = [label for _, label in files[first : first + READ_AT_ONCE]]
        images = list(islice(contents, len(labels)))
        yield images, np.array(labels, np.int64)


def _content(file: Place) -> bytes:
    try:
        with open_input(file) as stream:
            return stream.read()
    except OSError as error:
        raise UserError(f"image {str(file)!r} cannot be read: {error.strerror or error}") from None
