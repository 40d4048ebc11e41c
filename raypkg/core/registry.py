"""Name → function, found by scanning a folder: an addition is one file and no edit elsewhere.

Names are read from the source of the decorators, so a wrong one is told before anything heavy is imported; looking a
name up imports its module. The keyword-only part of a registered function's signature is its schema: names, types,
ranges (``Annotated[float, Field(gt=0)]``) and defaults. Its docstring's first line is the help text.
"""

import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from pydantic import create_model
from pydantic.errors import PydanticUserError

from .config import Settings, validate
from .decorators import decorators_in
from .errors import UserError, ending_told, unknown

F = TypeVar("F", bound=Callable[..., Any])
BUNDLE = "options"  # a parameter of this name takes all options as one settings object
USER_CODE = "user code"  # the source of an entry that is not ours


@dataclass(frozen=True)
class Entry:
    """One registered function with its citation and the keywords that its caller supplies."""

    name: str
    function: Callable[..., Any]
    source: str
    given: tuple[str, ...]

    @property
    def help(self) -> str:
        """The first line of the function's docstring."""
        return self.text.partition("\n")[0]

    @property
    def text(self) -> str:
        """The function's whole docstring, for a help page."""
        return inspect.getdoc(self.function) or ""

    @cached_property
    def schema(self) -> type[Settings]:
        """The options a user may set: the keyword-only parameters that the caller does not supply.

        A parameter ``options`` whose type is a settings class stands for all of them.
        """
        hints, parameters = self._signature()
        fields: dict[str, Any] = {}
        for name, parameter in parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY or name in self.given:
                continue
            if name not in hints or parameter.default is parameter.empty:
                module = self.function.__module__
                where = getattr(sys.modules.get(module), "__file__", module)  # a built-in one has no file
                raise UserError(f"{self.name}: option {name!r} needs a type and a default (in {where})")
            fields[name] = (hints[name], parameter.default)
        if self._bundled(hints):
            return hints[BUNDLE]
        if not fields:
            return Settings
        try:
            return create_model(self.name, __base__=Settings, **fields)
        except PydanticUserError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self.name}: its options {', '.join(fields)} cannot be settings: {reason}") from None

    def _signature(self) -> tuple[dict[str, Any], Mapping[str, inspect.Parameter]]:
        """Return the function's annotations and its parameters."""
        function = self.function.__init__ if inspect.isclass(self.function) else self.function
        try:
            hints = typing.get_type_hints(function, include_extras=True)
            return hints, inspect.signature(self.function).parameters
        except (TypeError, ValueError, NameError) as error:  # not written in Python, or annotated with unknown names
            raise UserError(f"{self.name}: its signature cannot be read: {error}") from None

    @property
    def needs(self) -> list[str]:
        """Those of the function's parameters that neither the caller supplies nor an option fills in."""
        parameters = inspect.signature(self.function).parameters.values()
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        places = [parameter for parameter in parameters if parameter.kind in named]
        return [parameter.name for parameter in places if parameter.default is parameter.empty]

    @property
    def declares(self) -> set[str]:
        """Those of the keywords that callers supply which the function takes."""
        return set(self.given) & set(inspect.signature(self.function).parameters)

    def options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the user's options, checked and converted by the schema."""
        checked = validate(self.schema, values, prefix=f"{self.name} option ")
        return {BUNDLE: checked} if self._bundled({BUNDLE: self.schema}) else dict(checked)

    def _bundled(self, hints: Mapping[str, Any]) -> bool:
        kind = hints.get(BUNDLE)
        takes = BUNDLE in inspect.signature(self.function).parameters
        return takes and isinstance(kind, type) and issubclass(kind, Settings)

    def __call__(self, *arguments: Any, options: Mapping[str, Any] | None = None, **given: Any) -> Any:
        """Call the function with the user's options and those supplied keywords that it declares."""
        supplied = {name: value for name, value in given.items() if name in self.declares}
        chosen = self.options(options or {})
        if self.source != USER_CODE:
            return self.function(*arguments, **supplied, **chosen)
        with ending_told(repr(self.name)):
            return self.function(*arguments, **supplied, **chosen)


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
        entry = Entry(name, function, source, self.given)
        entry.schema  # noqa: B018 - a bad signature fails at registration, not at first use
        return entry

    def _check_once(self, name: str, there: str, here: str) -> None:
        if there != here:  # the same one: a module that is imported anew
            raise UserError(f"{self.kind} {name!r} is registered twice, in {there} and {here}")

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """The module of every name in the packages, by their source: nothing is imported."""
        modules: dict[str, str] = {}
        for package in self.packages:
            for decorator, name, module in decorators_in(package):
                if decorator == self.decorator:
                    self._check_once(name, modules.setdefault(name, module), module)
        return modules

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
