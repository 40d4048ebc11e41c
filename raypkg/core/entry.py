"""A registered function: what its signature lets users set, and calling it with what they chose.

The keyword-only part of the signature is its schema: names, types, ranges (``Annotated[float, Field(gt=0)]``) and
defaults. The docstring's first line is the help text.
"""

import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import create_model
from pydantic.errors import PydanticUserError

from .config import Settings, validate
from .errors import UserError, ending_told

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
