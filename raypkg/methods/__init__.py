"""The methods, a room each: mathematics in pure PyTorch, a hook, settings and an experiment."""

import importlib
import pkgutil

from raypkg.core.registry import Registry


def registries() -> list[Registry]:
    """Return the registries that the rooms define."""
    rooms = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return [value for room in rooms for value in vars(room).values() if isinstance(value, Registry)]
