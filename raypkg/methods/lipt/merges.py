"""Merging models that started from the same weights into one (model soup, arXiv:2203.05482, with masks).

    @merge(name)    merged(initial, members, *, total, gather) → parameters

The members are those of this worker. A merge declares what else it needs by these keywords:

    total   sums a tensor over all workers: one all-reduce
    gather  returns the members of all workers, in the order of their numbers
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from raypkg.methods.sparse.masks import Masks

from . import merge

State = Mapping[str, Tensor]  # floating-point parameters by name
Total = Callable[[Tensor], Tensor]  # sums a tensor over all workers


class Member(NamedTuple):
    """A model trained on its own shard."""

    parameters: State
    masks: Masks  # in training; empty = dense


def masked_average(initial: State, members: Sequence[Member], total: Total = lambda sums: sums) -> dict[str, Tensor]:
    """Return w = Σ_i m_i ⊙ w_i / Σ_i m_i; weights in no mask keep their initial value w0.

    Parameters without masks (biases, norms) are averaged plainly. ``total`` sums a float64 tensor [2, p] over the
    workers.
    """

    def flat(state: State) -> Tensor:
        return torch.cat([state[name].detach().cpu().double().flatten() for name in initial])  # [p]

    # Σ m⊙w and Σ m. In float64, the order of the models does not show in float32.
    everywhere = {name: torch.ones_like(w) for name, w in initial.items()}
    start = flat(initial)
    sums = torch.zeros(2, len(start), dtype=torch.float64)
    for member in members:
        mask = flat({**everywhere, **member.masks})
        sums[0] += mask * flat(member.parameters)
        sums[1] += mask
    weighted, count = total(sums)
    mean = weighted / count.clamp_min(1)  # where the count is 0, so is the sum
    values = torch.where(count > 0, mean, start)
    pieces = values.split([w.numel() for w in initial.values()])
    return {name: piece.view(w.shape).to(w) for (name, w), piece in zip(initial.items(), pieces, strict=True)}


@merge("masked_mean")
def masked_mean(initial: State, members: Sequence[Member], *, total: Total) -> State:
    """Average each weight over the models whose mask has it; one all-reduce."""
    return masked_average(initial, members, total)


@merge("mean", source="arXiv:2203.05482")
def mean(initial: State, members: Sequence[Member], *, total: Total) -> State:
    """Average each weight over all models, pruned ones counting as zero; one all-reduce."""
    without_masks = [Member(member.parameters, {}) for member in members]
    return masked_average(initial, without_masks, total)


@torch.no_grad()
def reestimate(model: nn.Module, inputs: Iterable[Tensor]) -> int:
    """Set batch norm's running means and variances to those of the inputs; return the number of samples used.

    The statistics are the plain average over batches, not an exponential one. Without batch norm, no input is read.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        return 0
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's way to request the cumulative average
    was_training = model.training
    model.train()
    seen = 0
    for x in inputs:
        model(x)
        seen += len(x)
    model.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return seen
