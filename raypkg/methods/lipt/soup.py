"""Merging models that started from the same weights into one (model soup, arXiv:2203.05482, with masks)."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from raypkg.methods.sparse.masks import Masks

State = Mapping[str, Tensor]  # floating-point parameters by name


class Soup:
    """A running sum of models; sums of several soups add up, so one all-reduce merges those of all workers.

    w = Σ_i m_i ⊙ w_i / Σ_i m_i, and weights in no mask keep their initial value w0. Parameters that no mask names
    (biases, norms) are averaged plainly. Sums are float64, so that the order of models does not show in float32.

    Args:
        initial: w0, the parameters that all models started from.
    """

    def __init__(self, initial: State):
        self.initial = initial
        size = sum(w.numel() for w in initial.values())
        self.sums = torch.zeros(2, size, dtype=torch.float64)  # Σ m⊙w and Σ m, all parameters in a row

    def add(self, state: State, masks: Masks) -> None:
        """Stir in one model; without masks the result is the plain mean."""
        dense = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.initial.items()}
        mask = _flat({**dense, **masks}, self.initial)
        self.sums[0] += mask * _flat(state, self.initial)
        self.sums[1] += mask

    def merged(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, Tensor]:
        """Return the merged parameters; ``reduce`` sums the [2, p] float64 tensor over the workers."""
        weighted, count = reduce(self.sums.clone())
        start = _flat(self.initial, self.initial)
        mean = torch.where(count > 0, weighted / count.clamp_min(1), start)
        pieces = mean.split([w.numel() for w in self.initial.values()])
        return {name: piece.view(w.shape).to(w) for (name, w), piece in zip(self.initial.items(), pieces, strict=True)}


def greedy(
    initial: State, models: Sequence[tuple[dict[str, Tensor], Masks]], score: Callable[[dict[str, Tensor]], float]
) -> dict[str, Tensor]:
    """Return the soup that grows by each model, best first, as long as held-out accuracy does not fall.

    Args:
        initial: w0.
        models: parameters and masks of each model.
        score: held-out accuracy of parameters, higher is better.
    """
    ranked = sorted(models, key=lambda model: score(_soup(initial, [model])), reverse=True)
    chosen, best = ranked[:1], _soup(initial, ranked[:1])
    best_score = score(best)
    for model in ranked[1:]:
        trial = _soup(initial, [*chosen, model])
        if (trial_score := score(trial)) >= best_score:
            chosen, best, best_score = [*chosen, model], trial, trial_score
    return best


def _soup(initial: State, models: Sequence[tuple[dict[str, Tensor], Masks]]) -> dict[str, Tensor]:
    soup = Soup(initial)
    for state, masks in models:
        soup.add(state, masks)
    return soup.merged()


def _flat(state: State, like: State) -> Tensor:
    return torch.cat([state[name].detach().double().cpu().flatten() for name in like])
