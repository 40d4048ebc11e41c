"""Whose code a stored run may bring along.

Settings can name code (``my_code:net``), and a sweep's folder holds a file of it, so whoever can write a run folder
decides what runs when it is resumed. In a folder of the user's own, which not everybody can write, that is nobody else,
or somebody who could run anything as this user anyway. A folder of another owner, or in an object store, which has no
owners, runs none unless ``--trust`` or EFFRAY_TRUST=1 is given. An archive that the user unpacked is the user's own:
its ``config.toml`` is to be read first.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raypkg.core.errors import UserError
from raypkg.data.sources import dataset
from raypkg.models import model
from raypkg.runs.folder import CONFIG, RunFolder
from raypkg.runs.storage import Storage

TRUST = "EFFRAY_TRUST"


def trust_all() -> None:
    """Let every stored run of this process bring its code along."""
    os.environ[TRUST] = "1"


def stored_settings(folder: RunFolder) -> dict[str, Any]:
    """Return the settings of a stored run, not yet validated.

    Raises:
        UserError: they are lost or damaged; or they name code, and are neither the user's own nor trusted.
    """
    values = folder.config
    check_code(folder.storage, values)
    return values


def check_code(storage: Storage, values: Any, file: str = CONFIG) -> None:
    """Refuse stored settings that name code, unless they are the user's own or trusted.

    Args:
        storage: the folder of the file.
        values: what it holds, nested or by dotted names.
        file: that holds them.

    Raises:
        UserError: which code it names, and how to allow it.
    """
    if _is_trusted(storage, file):
        return
    if name := next((text for place, text in _texts(values) if _names_code(place, text)), None):
        raise UserError(f"{storage.root}/{file} is not your own alone and names code, {name!r}: --trust lets it run")


def check_file_of_code(storage: Storage, file: str) -> None:
    """Refuse a file that would be run, unless it is the user's own or trusted.

    Raises:
        UserError: how to allow it.
    """
    if not _is_trusted(storage, file):
        raise UserError(f"{storage.root}/{file} is not your own alone and would be run as code: --trust lets it")


def _is_trusted(storage: Storage, file: str) -> bool:
    if os.environ.get(TRUST) == "1":
        return True
    if storage.local is None:
        return False
    folder = storage.local.resolve()
    return _is_own(folder) and _is_own(folder / file)


def _is_own(path: Path) -> bool:
    """Say whether nobody else can have written a file, or put it into its folder; a link is not followed."""
    try:
        status = path.lstat()
    except FileNotFoundError:  # what is missing brings nothing along
        return True
    writable_by_all = status.st_mode & stat.S_IWOTH and not stat.S_ISLNK(status.st_mode)
    return status.st_uid == os.geteuid() and not writable_by_all


def _names_code(place: str, text: str) -> bool:
    """Say whether a text imports a module: none of a registry's own names, such as torchvision:resnet18, does."""
    head, colon, rest = text.partition(":")
    part = place.removesuffix(".name").rpartition(".")[2]
    registry = {"dataset": dataset, "model": model, "target": dataset}.get(part)
    if not colon or rest.startswith("//") or (registry and head in registry):  # the second is a URI
        return False
    return all(part.isidentifier() for part in head.split("."))


def _texts(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested settings with its dotted name."""
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, dict):
        for name, value in values.items():
            yield from _texts(value, f"{place}.{name}" if place else name)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value, place)
