"""Name → function, found by scanning a folder: an addition is one file and no edit elsewhere.

Names are read from the source of the decorators, so a wrong one is told before anything heavy is imported; looking a
name up imports its module.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .decorators import Decorator, decorators_in
from .errors import UserError, ending_told, unknown

if TYPE_CHECKING:  # it imports pydantic, which a list of names need not wait for
    from .entry import Entry

F = TypeVar("F", bound=Callable[..., Any])


class Registry:
    """The functions of one kind; ``@kind(name, source=…)`` adds one, ``kind[name]`` finds it.

    Args:
        kind: what the entries are, for error messages ("model").
        packages: whose modules have them: ``raypkg.models``, or the modules of one name in several packages,
            ``raypkg.methods.*.experiment``.
        given: keywords that callers supply and users cannot set ("rng").
        decorator: the registry as its decorators call it, where that is not its kind.
    """

    def __init__(self, kind: str, *packages: str, given: tuple[str, ...] = (), decorator: str = ""):
        self.kind = kind
        self.packages = packages
        self.given = given
        self.decorator = decorator or kind
        self._entries: dict[str, Entry] = {}  # of the modules that are imported

    def __call__(self, name: str, *, source: str = "") -> Callable[[F], F]:
        """Register the decorated function; its signature is checked at once."""

        def register(function: F) -> F:
            taken = self._entries.get(name)
            if taken:
                self._check_once(name, taken.function.__module__, function.__module__)
            self._entries[name] = self._entry(name, function, source)
            return function

        return register

    def _entry(self, name: str, function: Callable[..., Any], source: str) -> Entry:
        from .entry import Entry

        entry = Entry(name, function, source, self.given)
        entry.schema  # noqa: B018 - a bad signature fails at registration, not at first use
        return entry

    def _check_once(self, name: str, there: str, here: str) -> None:
        if there != here:  # the same one: a module that is imported anew
            raise UserError(f"{self.kind} {name!r} is registered twice, in {there} and {here}")

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """The module of every name in the packages, by their source: nothing is imported."""
        return {name: found.module for name, found in self._written.items()}

    @property
    def lines(self) -> Mapping[str, str]:
        """The first line of help of every name, of those in the packages by their source: nothing is imported."""
        others = {name: entry.help for name, entry in self._entries.items() if name not in self.modules}
        return others | {name: found.line for name, found in self._written.items()}

    @cached_property
    def _written(self) -> Mapping[str, Decorator]:
        written: dict[str, Decorator] = {}
        for package in self.packages:
            for found in decorators_in(package):
                if found.kind == self.decorator:
                    first = written.setdefault(found.name, found)
                    self._check_once(found.name, first.module, found.module)
        return written

    @property
    def names(self) -> list[str]:
        """All names, also of entries that other modules than those of the packages have registered."""
        return sorted({*self.modules, *self._entries})

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self.modules

    @property
    def entries(self) -> Mapping[str, Entry]:
        """All entries by name, after importing the modules that have them."""
        return {name: self[name] for name in self.names}

    def check(self, name: str) -> None:
        """Refuse an unknown name, importing nothing; whether the user's own code exists is not looked at.

        Raises:
            UserError: which names there are.
        """
        head, colon, _ = name.partition(":")
        if head not in self and not colon:
            raise unknown(self.kind, name, self.names)

    def __getitem__(self, name: str) -> Entry:
        """Find an entry by name, or import the user's own ``package.module:function``."""
        from .entry import USER_CODE

        self.check(name)
        head, _, _ = name.partition(":")
        if head in self.modules:
            importlib.import_module(self.modules[head])
        if head in self._entries:
            return self._entries[head]
        return self._entry(name, self._imported(name), USER_CODE)

    def _imported(self, name: str) -> Callable[..., Any]:
        path, _, attribute = name.partition(":")
        if not all(part.isidentifier() for part in [*path.split("."), attribute]):
            raise unknown(f"{self.kind} or module", name, self.names)
        if os.getcwd() not in sys.path:  # a console script does not see the working folder by itself
            sys.path.append(os.getcwd())
        try:
            with ending_told(f"importing {name!r}"):
                module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name and path.startswith(error.name):
                raise unknown(f"{self.kind} or module", name, self.names) from None
            raise UserError(f"{self.kind} {name!r}: its module needs {error.name!r}, which is not installed") from error
        except SyntaxError as error:
            raise UserError(f"{self.kind} {name!r}: its module is not valid Python: {error}") from None
        if not hasattr(module, attribute):
            raise UserError(f"{self.kind} {name!r}: module {path!r} has no {attribute!r}")
        function = getattr(module, attribute)
        if not callable(function):
            raise UserError(f"{self.kind} {name!r} is a {type(function).__name__}, not a function")
        return function


class Lookup(NamedTuple):
    """A name that settings have for an entry of a registry, with its options."""

    registry: Registry
    name: str
    options: Mapping[str, Any] = {}


def argument(name: str) -> str:
    """Return what follows the colon of a name like ``parquet:PATH``, or an empty string.

    >>> argument("parquet:/data/cifar10"), argument("digits")
    ('/data/cifar10', '')
    """
    return name.partition(":")[2]
