"""The plain mean of all models."""

from collections.abc import Sequence

from raypkg.methods.lipt.soup import Member, Soup, State, Total

from . import merge


@merge("mean", source="arXiv:2203.05482")
def mean(initial: State, members: Sequence[Member], *, total: Total) -> State:
    """Average each weight over all models, pruned ones counting as zero; one all-reduce."""
    without_masks = [Member(member.parameters, {}) for member in members]
    return Soup(initial, without_masks).merged(total)
