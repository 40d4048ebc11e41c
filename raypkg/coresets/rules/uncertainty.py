"""Uncertainty sampling: keep the samples the model is least sure of."""

from typing import Literal

from torch import Tensor
from torch.special import entr

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset

Measure = Literal["margin", "entropy", "confidence"]


@coreset("uncertainty", source="arXiv:1906.11829")
def select(view: HeadView, budget: int, *, measure: Measure = "margin") -> Coreset:
    """Keep the samples with the most uncertain predictions, whatever their labels.

    With the probabilities in descending order, p_1 ≥ p_2 ≥ …, the largest

        margin  1 − (p_1 − p_2)        entropy  −Σ_c p_c ln p_c        confidence  1 − p_1

    Args:
        view: the samples.
        budget: how many to keep.
        measure: of uncertainty; all three order the samples alike if there are two classes.

    Differs from the paper: it is the model of the view that selects, no smaller proxy of it.
    """
    p = view.logits.softmax(dim=1)
    p = p.sort(dim=1, descending=True).values  # [n, C]
    scores = _uncertainty(p, measure)
    return Coreset.uniform(largest(scores, budget))


def _uncertainty(p: Tensor, measure: Measure) -> Tensor:
    others = p[:, 1:]  # p_2, p_3, …; empty if there is one class, of which all samples are equally sure
    doubt = others.sum(dim=1)  # 1 − p_1, with the digits that a p_1 near 1 has lost
    if measure == "confidence":
        return doubt
    if measure == "margin":
        second = others[:, :1].sum(dim=1)
        return doubt + second
    entropy_of_others = entr(others).sum(dim=1)
    log_first = (-doubt).log1p()  # ln p_1
    return entropy_of_others - (1 - doubt) * log_first
