"""The mean of the models that have a weight."""

from collections.abc import Sequence

from raypkg.methods.lipt.soup import Member, Soup, State, Total

from . import merge


@merge("masked_mean")
def masked_mean(initial: State, members: Sequence[Member], *, total: Total) -> State:
    """Average each weight over the models whose mask has it; one all-reduce."""
    return Soup(initial, members).merged(total)
