"""Deletions answered within milliseconds by the linearised training; ours, not the paper's.

H is the Hessian of the mean loss at the weights of half-time, and c_t the change of the mean gradient at w_t without
r of n samples. To first order, training without them ends at w + v:

    v_{t+1} = v_t − η_t ((H + λ) v_t − c_t)        c_t = (Σ_gone ∇loss_i(w_t) − r g_t) / (n − r)

With c_t constant within each of 8 segments of the training, v = Q Σ_k f_k ∘ Qᵀ c_k, where H + λ = Q diag(μ) Qᵀ and
f_k = Σ_{t in k} η_t Π_{s>t} (1 − η_s μ). Endless training would give Newton's step, f = 1/μ, which is far off after a
short one. Kin: the unrolled influence of Hara et al. 2019 (arXiv:1906.08473), Hessian-free in arXiv:2404.01712.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.coresets.gradients import HeadView
from raypkg.data.split import Split
from raypkg.methods.audit.influence import HeadHessian

from .objective import Objective

Step = tuple[float, Tensor, Tensor]  # η_t, w_t and g_t
MOST = 2048  # parameters: H takes 32 MiB, its eigenvectors some seconds
SEGMENTS = 8
SAMPLES = 8192  # for H, spread over those in use


class Linearised:
    """The linearised training of a logistic regression on the samples ``used``, int64 [n], from its record."""

    def __init__(self, objective: Objective, split: Split, record: Sequence[Step], used: Tensor, decay: float):
        _, w, _ = record[len(record) // 2]
        size = len(w)
        if size > MOST:
            raise UserError(f"approximate: the model has {size:,} parameters, its Hessian is factored up to {MOST:,}")
        self._objective, self._split, self._n = objective, split, len(used)
        some = used[torch.linspace(0, len(used) - 1, min(SAMPLES, len(used))).long()]
        x, y = split.batch(some)
        logits = objective.logits(split, w, some)
        view = HeadView(logits, split.inputs(x, logits.dtype).flatten(1), y)
        mu, vectors = torch.linalg.eigh(HeadHessian(view, decay).dense)
        # Rows of [W, b] one after another → W and then b.
        flat = torch.arange(size)
        weights = size - split.num_classes
        order = torch.cat([flat[:weights].view(split.num_classes, -1), flat[weights:, None]], 1).flatten()
        self._vectors = torch.empty_like(vectors)  # Q [p, p]
        self._vectors[order] = vectors

        self._places: list[tuple[Tensor, Tensor]] = []  # w and mean g of each segment, the last one first
        filters = []
        later = torch.ones_like(mu)  # Π_{s>t} (1 − η_s μ)
        for segment in reversed(torch.arange(len(record)).tensor_split(min(SEGMENTS, len(record)))):
            rates, path, gradients = zip(*(record[t] for t in segment.tolist()), strict=True)
            filters.append(torch.zeros_like(mu))
            for rate in reversed(rates):
                filters[-1] += rate * later
                later = later * (1 - rate * mu)
            self._places.append((path[len(path) // 2], torch.stack(gradients).mean(0)))
        self._filters = torch.stack(filters, 1)  # f [p, K]

    def change(self, gone: Tensor) -> Tensor:
        """Return v, float64 [p], of the deletion of samples, by position."""
        kicks = [self._objective.gradient_sum(self._split, w, gone) - len(gone) * g for w, g in self._places]
        c = torch.stack(kicks, 1) / (self._n - len(gone))  # [p, K]
        return self._vectors @ (self._filters * (self._vectors.T @ c)).sum(1)
