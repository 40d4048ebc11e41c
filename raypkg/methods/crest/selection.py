"""Mini-batch coresets (arXiv:2306.01244, section 4.1): random subsets of active samples, their medoids, the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from raypkg.core.seeds import generator
from raypkg.coresets.facility import Distances, cluster_shares, facility_location
from raypkg.coresets.gradients import HeadView
from raypkg.data.augment import compose
from raypkg.data.coreset import Coreset
from raypkg.data.split import Split

from .settings import CrestOptions

CACHED = 2**30  # bytes of cached distances: all of those of a subset of 16,000 samples


@dataclass(frozen=True, eq=False)
class Subset:
    """Samples with the random numbers that augment them: selection, checks and training see the same images."""

    indices: Tensor  # positions in the training split, int64 [r]
    draws: Tensor  # uniform numbers that augment each sample, [r, d]; d = 0: not augmented

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, positions: Tensor | slice) -> Subset:
        return Subset(self.indices[positions], self.draws[positions])

    @classmethod
    def random(cls, candidates: Tensor, count: int, augment: Sequence[str], rng: torch.Generator) -> Subset:
        """Draw ``count`` of the candidates, or all if there are fewer, in random order, and their augmentation."""
        order = torch.randperm(len(candidates), generator=rng)
        indices = candidates[order[:count]]
        return cls(indices, torch.rand(len(indices), compose(augment).draws, generator=rng))

    @classmethod
    def concat(cls, subsets: Sequence[Subset]) -> Subset:
        """Join subsets in their order; they may share samples, augmented differently."""
        indices = [subset.indices for subset in subsets]
        draws = [subset.draws for subset in subsets]
        return cls(torch.cat(indices), torch.cat(draws))

    def split(self, whole: Split, augment: Sequence[str]) -> Split:
        """Return the samples as a split of their own, in which row i of the draws augments sample i.

        >>> images = torch.arange(4, dtype=torch.uint8).view(2, 1, 1, 2)
        >>> whole = Split.from_tensors(images, torch.tensor([0, 1]))
        >>> twice = Subset(torch.tensor([1, 1]), torch.tensor([[0.9], [0.1]]))
        >>> twice.split(whole, ["flip"]).batch([0, 1])[0].flatten().tolist()
        [2, 3, 3, 2]
        """
        indices = self.indices.numpy()
        change = compose(augment)

        def take(rows: np.ndarray) -> np.ndarray:
            if not self.draws.shape[1]:
                return whole.take(indices[rows])
            images, _ = whole.batch(indices[rows])
            changed = change(images, self.draws[torch.from_numpy(rows)])  # [b, C, H, W]
            return changed.permute(0, 2, 3, 1).numpy()  # a split stores channels last

        return replace(whole, take=take, y=whole.y[self.indices], ids=None)


@dataclass(frozen=True, eq=False)
class Chosen:
    """A mini-batch coreset, with the losses of its random subset."""

    coreset: Coreset  # positions in the training split, with weights
    draws: Tensor  # uniform numbers that augment its samples, [m, d]
    loss: float  # Σ γ_j loss_j / r over the medoids
    losses: Tensor  # of all samples of the random subset, [r]

    @property
    def samples(self) -> Subset:
        """The coreset's samples, as they are trained on."""
        return Subset(self.coreset.indices, self.draws)

    def shuffled(self, rng: torch.Generator) -> Chosen:
        """Return the coreset in random order: chosen, its most central medoids come first."""
        order = torch.randperm(len(self.coreset), generator=rng)
        coreset = Coreset(self.coreset.indices[order], self.coreset.weights[order])
        return replace(self, coreset=coreset, draws=self.draws[order])


def choose_minibatches(subsets: Sequence[Subset], view: HeadView, size: int) -> list[Chosen]:
    """Choose m = ``size`` of the samples V of each random subset; the view is of all subsets, one after another."""
    sizes = [len(subset) for subset in subsets]
    chosen = []
    for subset, logits, y in zip(subsets, view.logits.split(sizes), view.y.split(sizes), strict=True):
        picked = minibatch_coreset(logits, y, size)
        losses = F.cross_entropy(logits, y, reduction="none")  # [r]
        loss = float(picked.weights @ losses[picked.indices]) / len(picked)
        medoids = subset[picked.indices]
        chosen.append(Chosen(Coreset(medoids.indices, picked.weights), medoids.draws, loss, losses))
    return chosen


def minibatch_coreset(logits: Tensor, y: Tensor, size: int) -> Coreset:
    """Choose medoids of the logit gradients p − e_y of a random subset V, each weighted by the size of its cluster.

        S = argmin Σ_{i∈V} min_{j∈S} ‖(p_i − e_i) − (p_j − e_j)‖,  |S| = m        w_j = γ_j · m/r

    S is found by greedy facility location. γ_j counts the samples of V that are nearest to medoid j, so the mean of
    w · loss over the medoids is Σ γ_j loss_j / r. If m ≥ r, all of V is returned, with weights 1. The result gives
    positions in V, in the order in which they were chosen.

    >>> logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    >>> minibatch_coreset(logits, torch.tensor([1, 1, 1]), 2)
    Coreset(indices=tensor([0, 2]), weights=tensor([1.3333, 0.6667]))
    """
    if size >= len(y):
        return Coreset.uniform(torch.arange(len(y)))
    view = HeadView(logits, logits.new_empty(len(y), 0), y)  # a head without inputs
    distances = Distances(view, memory=CACHED)
    medoids = facility_location(distances, size)
    shares = cluster_shares(distances, medoids)  # γ_j
    weights = shares * size / len(view)  # their mean is 1, as in every coreset
    return Coreset(medoids, weights.float())


@dataclass(eq=False)
class ActiveSamples:
    """The active samples V, from which random subsets are drawn: those that are not learned yet."""

    active: Tensor  # bool [n]
    low: Tensor  # length of each sample's latest run of losses ≤ α, int32 [n]
    high: Tensor  # True if a loss was above α since the last exclusion, bool [n]
    exclusions: int = 0  # times that T2 steps have passed

    @classmethod
    def all_of(cls, indices: Tensor) -> ActiveSamples:
        """Return the samples at these positions of the training split, all active."""
        n = int(indices.max()) + 1
        nothing = torch.zeros(n, dtype=torch.bool)
        active = nothing.index_fill(0, indices, True)
        return cls(active, low=torch.zeros(n, dtype=torch.int32), high=nothing)

    @property
    def candidates(self) -> Tensor:
        """Positions of the active samples, ascending, int64."""
        return self.active.nonzero()[:, 0]

    def record(self, indices: Tensor, losses: Tensor, alpha: float) -> None:
        """Record losses that a choice or a check computed anyway; with α = 0, none is low."""
        is_low = (losses <= alpha) & (alpha > 0)
        one_more = self.low[indices] + 1
        self.low[indices] = one_more.where(is_low, 0)
        self.high[indices] |= ~is_low

    def exclude(self, step: int, options: CrestOptions, *, least: int) -> None:
        """Exclude learned samples if T2 steps have passed since the last exclusion.

        A sample is learned after ``exclude_after`` low losses in a row. If that is 0, the paper's rule applies: all
        losses since the last exclusion are low. If fewer than ``least`` samples would stay, none is excluded.
        """
        after = options.exclude_after
        due = step // options.exclude_every_steps
        if due <= self.exclusions:
            return
        self.exclusions = due
        learned = self.low >= after if after else (self.low > 0) & ~self.high
        stay = self.active & ~learned
        if int(stay.sum()) >= least:
            self.active = stay
        self.high.zero_()
        if not after:
            self.low.zero_()


@dataclass(eq=False)
class Pool:
    """The pool of P mini-batch coresets, each computed when it is first drawn, with the weights of one moment."""

    update: int  # l, the number of the pool, from 1
    size: int  # P
    candidates: Tensor  # the active samples, from which random subsets are drawn
    weights: Mapping[str, Tensor] | None  # state of the model that chooses; None: the model as it is
    chosen: dict[int, Chosen] = field(default_factory=dict)  # p → the coreset, for those computed so far

    def draw(self, steps: range, seed: int) -> list[int]:
        """Draw p for each of the steps."""
        # One generator per step: its draw does not depend on where an interval or a resumed training begins.
        generators = (generator(seed, "crest draw", step) for step in steps)
        return [int(torch.randint(self.size, (), generator=rng)) for rng in generators]
