"""The greedy soup: only models that help on held-out samples."""

from collections.abc import Callable, Sequence

from raypkg.methods.lipt.soup import Member, Soup, State

from . import merge


@merge("greedy", source="arXiv:2203.05482")
def greedy(
    initial: State,
    members: Sequence[Member],
    *,
    gather: Callable[[Sequence[Member]], list[Member]],
    score: Callable[[State], float],
) -> State:
    """Add models, best first, as long as held-out accuracy does not fall; every worker sends its models once."""

    def score_alone(member: Member) -> float:
        return score(Soup(initial, [member]).merged())

    ranked = sorted(gather(members), key=score_alone, reverse=True)
    chosen = ranked[:1]
    best = Soup(initial, chosen).merged()
    best_score = score(best)
    for member in ranked[1:]:
        trial = Soup(initial, [*chosen, member]).merged()
        trial_score = score(trial)
        if trial_score >= best_score:
            chosen.append(member)
            best = trial
            best_score = trial_score
    return best
