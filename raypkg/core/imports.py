"""Imports of heavy and of optional packages."""

import gc
import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from .errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import PyTorch and its dependents without garbage collection, and exempt them from it afterwards.

    PyTorch consists of a quarter of a million objects. The collector would visit them again and again, here and in
    every later import, which takes a quarter of a short run. Nothing happens if PyTorch is imported already.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def extra(package: str, name: str, what: str) -> ModuleType:
    """Import a package of the optional extra ``name``, which ``what`` needs, or say how to install it.

    >>> extra("transformrs", "text", "a model of Hugging Face")
    Traceback (most recent call last):
    raypkg.core.errors.UserError: a model of Hugging Face needs the package 'transformrs': pip install 'effray[text]'
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs the package {error.name!r}: pip install 'effray[{name}]'") from None


def announce_download(name: str, file: str, what: str) -> None:
    """Log a warning if a model or tokenizer of the Hugging Face hub, without ``file`` in its cache, is downloaded."""
    hub = extra("huggingface_hub", "text", what)
    if Path(name).is_dir() or hub.constants.HF_HUB_OFFLINE:
        return
    with suppress(ValueError):  # an invalid name: reading it raises a better error
        if not isinstance(hub.try_to_load_from_cache(name, file), str):
            log.warning("%s of %s is not in the cache and is downloaded from %s", what, name, hub.constants.ENDPOINT)
