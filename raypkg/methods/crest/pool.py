"""Mini-batch coresets of random subsets, chosen by whoever holds a shard, and the pool that they make up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.core.seeds import generator
from raypkg.coresets.gradients import HeadView
from raypkg.coresets.sharded import Scorer
from raypkg.data.coreset import Coreset
from raypkg.engine.costs import Cost
from raypkg.engine.shards import Shard

from .minibatch import logit_gradients, minibatch_coreset


class Chosen(NamedTuple):
    """A mini-batch coreset and what its choice has seen.

    Attributes:
        coreset: positions in the training split, with weights.
        loss: Σ γ_j loss_j / r of its medoids.
        losses: of all samples of the random subset [r].
        errors: by how much its mean logit gradient, and that of m random samples, miss the subset's [2, C].
    """

    coreset: Coreset
    loss: float
    losses: Tensor
    errors: Tensor


def choose(
    shard: Shard, scorer: Scorer, subsets: Sequence[Tensor], size: int, memory: int
) -> tuple[list[Chosen], Cost]:
    """Choose a mini-batch coreset of every ``world``-th random subset, in one forward pass over all of them."""
    mine, cost = subsets[shard.rank :: shard.world], Cost("select")
    if not mine:
        return [], cost
    with cost:
        view = _view(shard, scorer, torch.cat(list(mine)))
        cost.forward += len(view)
        sizes = [len(subset) for subset in mine]
        parts = zip(mine, view.logits.split(sizes), view.y.split(sizes), strict=True)
        return [_chosen(indices, logits, y, size, memory) for indices, logits, y in parts], cost


def _chosen(indices: Tensor, logits: Tensor, y: Tensor, size: int, memory: int) -> Chosen:
    picked = minibatch_coreset(logits, y, size, memory=memory)
    losses, gradients = F.cross_entropy(logits, y, reduction="none"), logit_gradients(logits, y).residual
    means = [picked.weights @ gradients[picked.indices] / len(picked), gradients[:size].mean(dim=0)]  # drawn in order
    loss = float(picked.weights @ losses[picked.indices]) / len(picked)
    return Chosen(picked.at(indices), loss, losses, torch.stack(means) - gradients.mean(dim=0))


def subset_losses(shard: Shard, scorer: Scorer, indices: Tensor) -> Tensor:
    """Return the losses of this holder's slice of the indices."""
    mine = indices.tensor_split(shard.world)[shard.rank]
    if not len(mine):
        return torch.empty(0)
    view = _view(shard, scorer, mine)
    return F.cross_entropy(view.logits, view.y, reduction="none")


def _view(shard: Shard, scorer: Scorer, indices: Tensor) -> HeadView:
    try:
        return scorer.view(shard, indices)
    except UserError as error:
        raise UserError(f"CREST cannot go on with this model ({error}): lower the learning rate") from None


@dataclass
class Pool:
    """Mini-batch coresets chosen with the weights of one moment; each is computed when it is first drawn.

    Attributes:
        update: l, which pool this is.
        size: P.
        candidates: the active samples, of which random subsets are drawn.
        weights: state of the model that chooses.
        chosen: p → what was computed so far.
    """

    update: int
    size: int
    candidates: Tensor
    weights: Mapping[str, Tensor]
    chosen: dict[int, Chosen] = field(default_factory=dict)

    def subset(self, p: int, count: int, seed: int) -> Tensor:
        """Draw the random subset V_p, the same whenever it is asked for."""
        return random_subset(self.candidates, count, generator(seed, "crest subset", self.update, p))

    def draw(self, steps: range, seed: int) -> list[int]:
        """Draw which coreset each of the steps trains on."""
        return [int(torch.randint(self.size, (), generator=generator(seed, "crest draw", step))) for step in steps]

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that ``restored`` takes back."""
        chosen = {p: [c.coreset.indices, c.coreset.weights, c.loss, c.losses, c.errors] for p, c in self.chosen.items()}
        return {**vars(self), "weights": dict(self.weights), "chosen": chosen}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Pool:
        """Return the pool of a checkpoint."""
        chosen = {p: Chosen(Coreset(*c[:2]), *c[2:]) for p, c in state["chosen"].items()}
        return cls(**{**state, "chosen": chosen})


def random_subset(candidates: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Draw ``count`` of the candidates, or all of them if they are fewer, in random order."""
    return candidates[torch.randperm(len(candidates), generator=rng)[:count]]
