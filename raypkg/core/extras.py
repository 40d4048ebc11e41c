"""Packages that only some users need, and what they fetch: how it is asked for, and that it is said."""

import importlib
import logging
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from .errors import UserError

log = logging.getLogger(__name__)


def extra(package: str, name: str, what: str) -> ModuleType:
    """Import a package of an optional extra.

    Args:
        package: to import.
        name: of the extra that has it.
        what: needs it, for the error.

    Raises:
        UserError: it is not installed.

    >>> extra("transformrs", "text", "a model of Hugging Face")
    Traceback (most recent call last):
    raypkg.core.errors.UserError: a model of Hugging Face needs the package 'transformrs': pip install 'effray[text]'
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs the package {error.name!r}: pip install 'effray[{name}]'") from None


def tell_download(name: str, file: str, what: str) -> None:
    """Say that a file of the hub is about to be downloaded, and from where.

    Args:
        name: on the hub; a folder is read as it is.
        file: by which the hub's cache is known to have it.
        what: is downloaded.
    """
    hub = extra("huggingface_hub", "text", what)
    if Path(name).is_dir() or hub.constants.HF_HUB_OFFLINE:
        return
    with suppress(ValueError):  # no name that the hub could have: reading it says so
        if not isinstance(hub.try_to_load_from_cache(name, file), str):
            log.warning("%s of %s is not in the cache and is downloaded from %s", what, name, hub.constants.ENDPOINT)
