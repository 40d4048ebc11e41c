"""Whose code a stored run may bring along.

Settings can name code (``my_code:net``), and a sweep's folder holds a file of it, so whoever can write a run folder
decides what runs when it is resumed. In a folder of the user's own that is nobody else: the files' owner could run
anything as this user anyway. A folder of another owner, or in an object store, which has no owners, runs none unless
``--trust`` or EFFRAY_TRUST=1 is given. An archive that the user unpacked is the user's own: its ``config.toml`` is to
be read first.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from raypkg.core.errors import UserError
from raypkg.data.sources import dataset
from raypkg.models import model
from raypkg.runs.folder import RunFolder
from raypkg.runs.storage import Storage

TRUST = "EFFRAY_TRUST"
CONFIG = "config.toml"
CODE = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")  # module:function


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


def check_code(storage: Storage, values: Any) -> None:
    """Refuse stored settings that name code, unless they are the user's own or trusted.

    Args:
        storage: the folder of ``config.toml``.
        values: what that holds.

    Raises:
        UserError: which code it names, and how to allow it.
    """
    if _is_trusted(storage, CONFIG):
        return
    if name := next((text for text in _texts(values) if _names_code(text)), None):
        raise UserError(f"{storage.root}/{CONFIG} is not your own and names code, {name!r}: --trust lets it run")


def check_file_of_code(storage: Storage, file: str) -> None:
    """Refuse a file that would be run, unless it is the user's own or trusted.

    Raises:
        UserError: how to allow it.
    """
    if not _is_trusted(storage, file):
        raise UserError(f"{storage.root}/{file} is not your own and would be run as code: --trust lets it")


def _is_trusted(storage: Storage, file: str) -> bool:
    if os.environ.get(TRUST) == "1":
        return True
    if storage.local is None:
        return False
    path = storage.local / file
    return not path.exists() or path.stat().st_uid == os.geteuid()  # what is missing brings nothing along


def _names_code(text: str) -> bool:
    head = text.partition(":")[0]
    ours = head in dataset.entries or head in model.entries  # as in torchvision:resnet18
    return not ours and CODE.fullmatch(text) is not None


def _texts(values: Any) -> Iterator[str]:
    """Yield every text in nested settings."""
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value)
