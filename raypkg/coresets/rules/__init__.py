"""Coreset selection methods, one file each: ``select(samples, budget, *, rng, …) → Coreset``.

The first parameter's annotation says what a method looks at: a ``HeadView`` costs a forward pass over all samples, a
``Record`` is there anyway. A method without a budget says itself how many samples to keep.
"""

import inspect
import typing

from raypkg.core.errors import UserError
from raypkg.core.registry import Entry, Registry

coreset = Registry("coreset method", "raypkg.coresets.rules", given=("rng", "valid", "memory", "progress"))


def needs_gradients(entry: Entry) -> bool:
    """Say whether a method needs a ``HeadView``, hence a forward pass."""
    from raypkg.coresets.record import Record

    first = next(iter(inspect.signature(entry.function).parameters), "")
    seen = typing.get_type_hints(entry.function).get(first)
    return Record not in (seen, *typing.get_args(seen))


def sizes_itself(entry: Entry) -> bool:
    """Say whether a method keeps as many samples as it sees fit.

    Raises:
        UserError: it takes neither (samples, budget) nor (samples).
    """
    parameters = inspect.signature(entry.function).parameters.values()
    places = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(places) not in (1, 2):
        raise UserError(f"coreset method {entry.name!r} takes {tuple(places)}: it must be (samples, budget, *, …)")
    return len(places) == 1
