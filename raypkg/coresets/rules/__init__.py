"""Coreset selection rules, one file each: ``select(samples, budget, *, rng, …) → Coreset``.

The decorator says what a rule looks at, and whether it chooses the size of its coreset itself:

    @coreset("infobatch", source="arXiv:2303.04947", sees="record", sizes_itself=True)
    def select(record: Record, *, rng: torch.Generator, …) -> Coreset:

With ``by_class=False`` it always sees the samples of all classes at once, as one that sizes its coreset itself does.

A rule that matches or covers the gradients of some samples declares them as a keyword ``target``, None for those that
it selects from. One that declares ``valid`` is given the same, but by default the held-out samples.
"""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from raypkg.core.errors import UserError
from raypkg.core.registry import Entry, F, Registry

Sees = Literal["gradients", "record"]


@dataclass(frozen=True)
class Rule(Entry):
    """A coreset rule.

    Attributes:
        sees: what it is called with: "gradients", a ``HeadView``, which costs a forward pass over all samples, or
            "record", a ``Record``, which training keeps anyway.
        sizes_itself: whether it keeps as many samples as it sees fit: ``select(samples, *, …)``, without a budget.
        by_class: whether it can select from each class by itself.

    Raises:
        UserError: the function's parameters are others.
    """

    sees: Sees = "gradients"
    sizes_itself: bool = False
    by_class: bool = True

    def __post_init__(self) -> None:
        names = _positional(self.function)
        if len(names) == (1 if self.sizes_itself else 2):
            return
        expected = "(samples, *, …)" if self.sizes_itself else "(samples, budget, *, …)"
        raise UserError(f"coreset rule {self.name!r} takes {tuple(names)}: it must be {expected}")

    @property
    def has_target(self) -> bool:
        """Whether it selects for a target."""
        return bool(self.declares & {"target", "valid"})

    def options(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the user's options, checked and converted by the schema.

        Raises:
            UserError: an unknown option, or a value that it does not allow.
        """
        if "target" in values:  # an option of gradmatch, before it was a setting of all such rules
            raise UserError(f"{self.name} option target is now called select.target")
        return super().options(values)

    @property
    def takes(self) -> tuple[type, ...]:
        """The classes that its samples are annotated with, each if it is a union; none where it does not say."""
        return tuple(kind for kind in _kinds_of_samples(self.function) if isinstance(kind, type))


class Declared(NamedTuple):
    """What a decorator says of a rule; see ``Rule``."""

    sees: Sees
    sizes_itself: bool
    by_class: bool


class Rules(Registry):
    """The coreset rules. A user's own function may be decorated as well; otherwise its signature tells."""

    def __init__(self) -> None:
        supplied = ("rng", "target", "valid", "memory", "progress")
        super().__init__("coreset rule", __name__, given=supplied, decorator="coreset")
        self._declared: dict[Callable[..., Any], Declared] = {}

    def __call__(
        self,
        name: str,
        *,
        source: str = "",
        sees: Sees = "gradients",
        sizes_itself: bool = False,
        by_class: bool = True,
    ) -> Callable[[F], F]:
        """Register the decorated function; its signature is checked at once."""
        register = super().__call__(name, source=source)

        def declare(function: F) -> F:
            self._declared[function] = Declared(sees, sizes_itself, by_class)
            return register(function)

        return declare

    def __getitem__(self, name: str) -> Rule:
        """Find a rule by name, or import the user's own ``package.module:function``."""
        return cast(Rule, super().__getitem__(name))

    def _entry(self, name: str, function: Callable[..., Any], source: str) -> Rule:
        checked = super()._entry(name, function, source)
        declared = self._declared.get(function) or _told_by_signature(function)
        return Rule(
            name=checked.name,
            function=checked.function,
            source=checked.source,
            given=checked.given,
            sees=declared.sees,
            sizes_itself=declared.sizes_itself,
            by_class=declared.by_class and not declared.sizes_itself,
        )


coreset = Rules()


def _told_by_signature(function: Callable[..., Any]) -> Declared:
    """Describe a function that was not decorated: by the annotation of its samples, and whether it takes a budget."""
    from raypkg.coresets.record import Record

    sees: Sees = "record" if Record in _kinds_of_samples(function) else "gradients"
    return Declared(sees, sizes_itself=len(_positional(function)) == 1, by_class=True)


def _kinds_of_samples(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the annotation of a function's samples, or its parts where it is a union."""
    names = _positional(function)
    annotation = typing.get_type_hints(function).get(names[0]) if names else None
    return typing.get_args(annotation) or (annotation,)


def _positional(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
