"""Rules that select a coreset, ``rule(samples, budget, *, rng, …) → Coreset``, grouped by what they go by.

The decorator states what a rule sees, whether it sizes its coreset itself, and the settings of its published form:

    @coreset("infobatch", source="arXiv:2303.04947", sees="record", sizes_itself=True)
    def infobatch(record: Record, *, rng: torch.Generator, …) -> Coreset:

A user's function without a decorator is described by its signature. A keyword with a type and a default is an option,
``--set select.options.NAME=VALUE``. effray supplies what a rule declares of these: ``target``, samples to select for,
None for those that it selects from, or ``valid``, by default the held-out ones; ``others``, the views of further
models, to average over; ``full_norms()``, the norms of the samples' full gradients, averaged over all models, float
[n]; ``memory``, bytes that it may use to save time; and ``progress``, the share of the training that is done.
"""

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from raypkg.core.errors import UserError
from raypkg.core.registry import Entry, F, Registry

Sees = Literal["gradients", "record", "rows"]


@dataclass(frozen=True)
class Rule(Entry):
    """A registered rule, whose function takes samples, a budget unless it sizes its coreset itself, and options."""

    # "gradients": a HeadView, which costs a forward pass over all samples; "record": a Record, which training keeps;
    # "rows": Rows of a language model, which `effray instruct` or a function of `CoresetLoader` computes
    sees: Sees
    sizes_itself: bool  # selects as many samples as it sees fit: no budget
    by_class: bool  # can select from each class by itself
    published: Mapping[str, Any]  # settings of a selection by dotted names, of the published form where it is another

    def __post_init__(self) -> None:
        names = _positional(self.function)
        if len(names) != (1 if self.sizes_itself else 2):
            expected = "(samples, *, …)" if self.sizes_itself else "(samples, budget, *, …)"
            raise UserError(f"coreset rule {self.name!r} takes {tuple(names)}: it must be {expected}")

    @property
    def has_target(self) -> bool:
        """Whether it can select for other samples."""
        return bool(self.declares & {"target", "valid"})

    @property
    def takes(self) -> tuple[type, ...]:
        """The classes in the annotation of its samples; empty without an annotation."""
        return tuple(kind for kind in _annotated(self.function) if isinstance(kind, type))


class Rules(Registry):
    """The registry of coreset rules."""

    def __init__(self) -> None:
        supplied = ("rng", "target", "valid", "others", "full_norms", "memory", "progress")
        super().__init__("coreset rule", __name__, given=supplied, decorator="coreset")
        self._declared: dict[Callable[..., Any], dict[str, Any]] = {}  # fields of ``Rule``

    def __call__(
        self,
        name: str,
        *,
        source: str = "",
        sees: Sees = "gradients",
        sizes_itself: bool = False,
        by_class: bool = True,
        published: Mapping[str, Any] | None = None,
    ) -> Callable[[F], F]:
        """Register the decorated function; its signature is validated at once."""
        register = super().__call__(name, source=source)
        fields: dict[str, Any] = {"sees": sees, "sizes_itself": sizes_itself, "by_class": by_class and not sizes_itself}
        fields["published"] = published or {}

        def declare(function: F) -> F:
            self._declared[function] = fields
            return register(function)

        return declare

    def __getitem__(self, name: str) -> Rule:
        """Find a rule by name, or import a user's ``package.module:function``."""
        return cast(Rule, super().__getitem__(name))

    def _entry(self, name: str, function: Callable[..., Any], source: str) -> Rule:
        from raypkg.coresets.record import Record, Rows

        entry = super()._entry(name, function, source)
        annotated = _annotated(function)
        sees = "rows" if Rows in annotated else "record" if Record in annotated else "gradients"
        alone = len(_positional(function)) == 1
        guessed = {"sees": sees, "sizes_itself": alone, "by_class": not alone, "published": {}}
        return Rule(name, function, source, entry.given, **self._declared.get(function, guessed))


coreset = Rules()


def _annotated(function: Callable[..., Any]) -> tuple[Any, ...]:
    """Return the annotation of a function's samples, or the parts of a union."""
    names = _positional(function)
    annotation = typing.get_type_hints(function).get(names[0]) if names else None
    return typing.get_args(annotation) or (annotation,)


def _positional(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
