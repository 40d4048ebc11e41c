"""Registries of functions by name, and imports of heavy packages.

An addition to a registry is one decorated function and no edit elsewhere.
The names are read from the source of the decorators, without importing the modules. A mistyped name is therefore an
error in 0.4 s instead of 3 s, and `effray --help` takes 0.1 s instead of 0.4 s. Only the module of an entry in use is
imported.
"""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .errors import UserError, unknown, user_code

if TYPE_CHECKING:  # it imports pydantic, which a list of names does not need
    from .config import Settings

log = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
BUNDLE = "options"  # a parameter of this name takes all options as one settings object
USER_CODE = "user code"  # source of an entry that is not ours


@dataclass(frozen=True)
class Entry:
    """A registered function. The keyword-only part of its signature is the schema of its options.

    Types, ranges (``Annotated[float, Field(gt=0)]``) and defaults come from there; the docstring is the help text.
    """

    name: str
    function: Callable[..., Any]
    source: str  # citation
    given: tuple[str, ...]  # keywords that callers supply and users cannot set

    @property
    def text(self) -> str:
        """The function's docstring."""
        return inspect.getdoc(self.function) or ""

    @property
    def help(self) -> str:
        """The first line of the function's docstring."""
        return self.text.partition("\n")[0]

    @cached_property
    def schema(self) -> type[Settings]:
        """Settings class of the options: the keyword-only parameters that callers do not supply, or the bundle."""
        from pydantic import create_model
        from pydantic.errors import PydanticUserError

        from .config import Settings

        function = self.function.__init__ if inspect.isclass(self.function) else self.function
        try:
            hints = typing.get_type_hints(function, include_extras=True)
            parameters = inspect.signature(self.function).parameters
        except (TypeError, ValueError, NameError) as error:  # not written in Python, or annotated with unknown names
            raise UserError(f"{self.name}: its signature cannot be read: {error}") from None
        fields: dict[str, Any] = {}
        for name, parameter in parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY or name in self.given:
                continue
            if name not in hints or parameter.default is parameter.empty:
                module = self.function.__module__
                where = getattr(sys.modules.get(module), "__file__", module)
                raise UserError(f"{self.name}: option {name!r} needs a type and a default (in {where})")
            fields[name] = (hints[name], parameter.default)
        bundle = hints.get(BUNDLE)
        if BUNDLE in parameters and isinstance(bundle, type) and issubclass(bundle, Settings):
            return bundle
        if not fields:
            return Settings
        try:
            return create_model(self.name, __base__=Settings, **fields)
        except PydanticUserError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self.name}: its options {', '.join(fields)} cannot be settings: {reason}") from None

    @property
    def needs(self) -> list[str]:
        """Positional parameters without a default, which neither callers nor options fill."""
        parameters = inspect.signature(self.function).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return [each.name for each in parameters if each.kind in positional and each.default is each.empty]

    @property
    def declares(self) -> set[str]:
        """Keywords supplied by callers that the function takes."""
        return set(self.given) & set(inspect.signature(self.function).parameters)

    def options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keyword arguments for a user's options, validated and converted by the schema."""
        from .config import validate

        checked = validate(self.schema, values, prefix=f"{self.name} option ")
        return {BUNDLE: checked} if BUNDLE in inspect.signature(self.function).parameters else dict(checked)

    def __call__(self, *arguments: Any, options: Mapping[str, Any] | None = None, **given: Any) -> Any:
        """Call the function with a user's options and the supplied keywords that it declares."""
        given["registered"] = self.name
        supplied = {name: value for name, value in given.items() if name in self.declares}
        chosen = self.options(options or {})
        if self.source != USER_CODE:
            return self.function(*arguments, **supplied, **chosen)
        with user_code():
            return self.function(*arguments, **supplied, **chosen)


class Decorated(NamedTuple):
    """A function in the source under a decorator with a name, such as ``@model("resnet20")``."""

    name: str
    help: str  # first line of the docstring
    module: str


class Registry:
    """Functions of one kind. ``@kind(name, source=…)`` adds one, ``kind[name]`` finds it.

    A place ``raypkg.models`` is a module, or all modules of a package; ``raypkg.methods.*.hook`` are the modules of one
    name in several packages. ``given`` are keywords that callers supply and users cannot set ("rng"); a function of
    several names takes ``registered``, its own. ``decorator`` is the registry's name in the source, where it differs
    from its kind.
    """

    def __init__(self, kind: str, *places: str, given: tuple[str, ...] = (), decorator: str = ""):
        self.kind = kind
        self.places = places
        self.given = given
        self.decorator = decorator or kind
        self._entries: dict[str, Entry] = {}  # of imported modules

    def __call__(self, name: str, *, source: str = "") -> Callable[[F], F]:
        """Register the decorated function; its signature is validated at once."""

        def register(function: F) -> F:
            taken, here = self._entries.get(name), function.__module__
            if taken and (there := taken.function.__module__) != here:  # a module registers again when it is reloaded
                raise UserError(f"{self.kind} {name!r} is registered twice, in {there} and {here}")
            self._entries[name] = self._entry(name, function, source)
            return function

        return register

    def _entry(self, name: str, function: Callable[..., Any], source: str) -> Entry:
        entry = Entry(name, function, source, self.given)
        entry.schema  # noqa: B018 - a bad signature fails at registration, not at first use
        return entry

    @cached_property
    def written(self) -> Mapping[str, Decorated]:
        """The entries in the source by name; nothing is imported."""
        return {found.name: found for place in self.places for found in _decorated_in(place, self.decorator)}

    @property
    def lines(self) -> Mapping[str, str]:
        """The line of help of every entry; nothing is imported."""
        registered = {name: entry.help for name, entry in self._entries.items()}
        return registered | {name: found.help for name, found in self.written.items()}

    @property
    def names(self) -> list[str]:
        """All names, those included that other modules have registered."""
        return sorted({*self.written, *self._entries})

    def __contains__(self, name: str) -> bool:
        return name in self._entries or name in self.written

    @property
    def entries(self) -> Mapping[str, Entry]:
        """All entries by name; their modules are imported."""
        return {name: self[name] for name in self.names}

    def check(self, name: str) -> None:
        """Refuse an unknown name; nothing is imported, so ``package.module:function`` passes unchecked."""
        head, colon, _ = name.partition(":")
        if head not in self and not colon:
            raise unknown(self.kind, name, self.names)

    def __getitem__(self, name: str) -> Entry:
        """Return an entry by name, or a user's ``package.module:function``, imported."""
        self.check(name)
        head = name.partition(":")[0]
        if found := self.written.get(head):
            importlib.import_module(found.module)
        if head in self._entries:
            return self._entries[head]
        return self._entry(name, imported(self.kind, name, self.names), USER_CODE)


def imported(kind: str, name: str, others: Iterable[str] = ()) -> Callable[..., Any]:
    """Import a user's ``package.module:function``; errors call it a ``kind``, which may be one of the others."""
    path, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in [*path.split("."), attribute]):
        raise unknown(f"{kind} or module", name, others)
    if os.getcwd() not in sys.path:  # a console script does not see the working directory
        sys.path.append(os.getcwd())
    with user_code():
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name and path.startswith(error.name):
                if get_close_matches(path, [*others]):
                    raise unknown(f"{kind} or module", name, others) from None
                place = f"neither {os.getcwd()} nor PYTHONPATH has a module {error.name!r}"
                raise UserError(f"unknown {kind} or module {name!r}: {place}") from None
            needed = f"its module needs {error.name!r}, which is not installed"
            raise UserError(f"{kind} {name!r}: {needed}") from error
        except SyntaxError as error:
            raise UserError(f"{kind} {name!r}: its module is not valid Python: {error}") from None
    if not hasattr(module, attribute):
        raise UserError(f"{kind} {name!r}: module {path!r} has no {attribute!r}")
    function = getattr(module, attribute)
    if not callable(function):
        raise UserError(f"{kind} {name!r} is a {type(function).__name__}, not a function")
    return function


class Lookup(NamedTuple):
    """A name in settings that stands for an entry of a registry, with its options."""

    registry: Registry
    name: str
    options: Mapping[str, Any] = {}


def argument(name: str) -> str:
    """Return the part after the colon of a name such as ``parquet:PATH``, or an empty string.

    >>> argument("parquet:/data/cifar10"), argument("digits")
    ('/data/cifar10', '')
    """
    return name.partition(":")[2]


def _decorated_in(place: str, decorator: str) -> Iterator[Decorated]:
    """Yield the top-level functions and classes of a place under a decorator with a name."""
    for module, file in _files_of(place):
        for statement in ast.parse(file.read_bytes()).body:
            if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
                continue
            for node in statement.decorator_list:
                match node:
                    case ast.Call(ast.Name(kind), [ast.Constant(str(name)), *_]) if kind == decorator:
                        help_text = (ast.get_docstring(statement) or "").partition("\n")[0]
                        yield Decorated(name, help_text, module)


def _files_of(place: str) -> Iterator[tuple[str, Path]]:
    parent, _, name = place.partition(".*.")
    spec = importlib.util.find_spec(parent)
    if spec is None:
        return
    if spec.submodule_search_locations is None:  # a module
        yield parent, Path(str(spec.origin))
        return
    for folder in spec.submodule_search_locations:
        for file in sorted(Path(folder).glob(f"*/{name}.py" if name else "[!_]*.py")):
            yield ".".join([parent, *file.relative_to(folder).with_suffix("").parts]), file


# Heavy and optional packages


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
    constants = extra("huggingface_hub.constants", "text", what)  # which the package does not import by itself
    if Path(name).exists() or constants.HF_HUB_OFFLINE:
        return
    with suppress(ValueError):  # an invalid name: reading it raises a better error
        if not isinstance(hub.try_to_load_from_cache(name, file), str):
            log.warning("%s of %s is not in the cache and is downloaded from %s", what, name, constants.ENDPOINT)
