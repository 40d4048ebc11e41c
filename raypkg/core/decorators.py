"""The names that a package's functions are registered by, read from its source: nothing of it is imported."""

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Decorator(NamedTuple):
    """A decorator with a name, ``@model("resnet20")``.

    Attributes:
        kind: what it is called, "model".
        name: its first argument, which must be written out.
        module: where it stands.
        line: the first of the docstring below it.
    """

    kind: str
    name: str
    module: str
    line: str


def decorators_in(package: str) -> Iterator[Decorator]:
    """Yield the decorators of a package's functions and classes.

    Args:
        package: ``raypkg.models``, or the modules of one name in several packages, ``raypkg.methods.*.experiment``.
    """
    for module, file in _modules(package):
        for kind, name, line in _decorators_of(file.read_bytes()):
            yield Decorator(kind, name, module, line)


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    """Yield the modules of a package with their files, or those of one name in each of its folders."""
    parent, _, name = package.partition(".*.")
    pattern = f"*/{name}.py" if name else "[!_]*.py"
    for place in importlib.import_module(parent).__path__:
        for file in sorted(Path(place).glob(pattern)):
            path = file.relative_to(place).with_suffix("")
            yield ".".join([parent, *path.parts]), file


@cache  # several registries share a package
def _decorators_of(source: bytes) -> list[tuple[str, str, str]]:
    """Return kind, name and first line of help of every decorator in a module that has one."""
    found = []
    for statement in ast.parse(source).body:
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            continue
        for decorator in statement.decorator_list:
            match decorator:
                case ast.Call(func=ast.Name(id=kind), args=[ast.Constant(value=str(name)), *_]):
                    line = (ast.get_docstring(statement) or "").partition("\n")[0]
                    found.append((kind, name, line))
    return found
