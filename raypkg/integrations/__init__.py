"""Adapters of the methods to the training loops of other libraries, which are imported only from here.

Accelerate needs none: ``prepare`` returns a CoresetLoader or a CrestLoader as it is.
"""

from collections.abc import Iterable
from inspect import signature

from raypkg.core.errors import unknown


def check_arguments(kind: type, names: Iterable[str]) -> None:
    """Refuse names of arguments that a class does not have, before training begins."""
    allowed = [*signature(kind).parameters]
    for name in names:
        if name not in allowed:
            raise unknown(f"argument of {kind.__name__}", name, allowed)
