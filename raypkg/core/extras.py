"""Packages that only some users need, and how they are asked for."""

import importlib
from types import ModuleType

from .errors import UserError


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
