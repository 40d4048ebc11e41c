"""Uncertainty sampling: keep the samples the model is least sure of."""

from typing import Literal

import torch
from torch import Tensor

from raypkg.coresets.gradients import HeadView
from raypkg.coresets.solvers import largest
from raypkg.data.coreset import Coreset

from . import coreset


@coreset("uncertainty", source="arXiv:1906.11829")
def select(view: HeadView, budget: int, *, measure: Literal["margin", "entropy", "confidence"] = "margin") -> Coreset:
    """Keep the samples with the most uncertain predictions, whatever their labels.

    With the probabilities in descending order, p_1 ≥ p_2 ≥ …, the largest

        margin  1 − (p_1 − p_2)        entropy  −Σ_c p_c ln p_c        confidence  1 − p_1

    Args:
        view: the samples.
        budget: how many to keep.
        measure: of uncertainty; all three order the samples alike if there are two classes.

    Differs from the paper: it is the model of the view that selects, no smaller proxy of it.
    """
    p = view.logits.softmax(dim=1).sort(dim=1, descending=True).values  # [n, C]
    return Coreset.uniform(largest(_uncertainty(p, measure), budget))


def _uncertainty(p: Tensor, measure: str) -> Tensor:
    doubt = p[:, 1:].sum(dim=1)  # 1 − p_1, with the digits that a p_1 near 1 has lost
    if measure == "margin":
        return doubt + p[:, 1:2].sum(dim=1)  # of one class, all are equally sure
    if measure == "confidence":
        return doubt
    return torch.special.entr(p[:, 1:]).sum(dim=1) - (1 - doubt) * (-doubt).log1p()
