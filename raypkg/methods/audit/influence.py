"""Influence functions of a linear head on fixed features (Koh & Liang 2017, arXiv:1703.04730), from factored gradients.

At a minimum w of F(w) = 1/n Σ_i ℓ_i(w) + λ/2 ‖w‖² with Hessian H, moving weight to sample i moves a held-out loss L by

    I_i = −∇Lᵀ H⁻¹ (g_i − ḡ)        g_i = ∇ℓ_i, ḡ = 1/n Σ_i g_i = −λw at the minimum

so a positive I_i is harmful. Removing a set S of m samples changes L by −Σ_{i∈S} I_i / (n − m), to first order.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from raypkg.core.errors import UserError
from raypkg.coresets.gradients import HeadView

EXACT = 8192  # parameters up to which H is spelt out and factored: 0.5 GiB in float64
AT_ONCE = 2**24  # numbers of full gradients that are in memory at a time
CLOSE = 1e-10  # residual of conjugate gradients, relative to the right-hand side
STEPS = 10_000


@dataclass(frozen=True, eq=False)
class HeadHessian:
    """The Hessian of F with respect to the head [W, b], at the logits of a view.

    H = 1/n Σ_i (diag(p_i) − p_i p_iᵀ) ⊗ [h_i; 1][h_i; 1]ᵀ + λ I        p = softmax(z)        [C(D+1), C(D+1)]

    >>> view = HeadView(torch.zeros(1, 2), torch.ones(1, 1), torch.tensor([0]))
    >>> HeadHessian(view, 0.5).product(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    tensor([[ 0.7500,  0.2500],
            [-0.2500, -0.2500]])
    """

    view: HeadView  # the training samples
    decay: float  # λ > 0: adding one vector to the weights of all classes changes no loss

    @property
    def size(self) -> int:
        """The number of parameters, C(D+1)."""
        return self.view.num_classes * (self.view.width + 1)

    @cached_property
    def _p(self) -> Tensor:  # [n, C]
        return torch.softmax(self.view.logits, 1)

    def product(self, matrix: Tensor) -> Tensor:
        """Return H M for M of shape [C, D+1], without H."""
        p = self._p
        change = self.view.through(matrix)  # of the logits [n, C]
        slope = p * (change - (p * change).sum(1, keepdim=True))  # (diag(p) − ppᵀ) change
        of_weight = slope.T @ self.view.features
        of_bias = slope.sum(0)
        return torch.cat([of_weight, of_bias[:, None]], 1) / len(p) + self.decay * matrix

    @property
    def dense(self) -> Tensor:
        """H, for rows of [W, b] one after another."""
        p, classes = self._p, self.view.num_classes
        inputs = torch.cat([self.view.features, torch.ones_like(p[:, :1])], 1)  # [n, D+1]
        width = inputs.shape[1]
        dense = inputs.new_empty(classes, width, classes, width)
        for c in range(classes):
            for k in range(c + 1):
                weight = p[:, c] * ((c == k) * 1.0 - p[:, k])  # [n]
                dense[c, :, k, :] = dense[k, :, c, :] = inputs.T @ (inputs * weight[:, None]) / len(p)
        dense = dense.view(self.size, self.size)
        dense.diagonal().add_(self.decay)
        return dense

    @cached_property
    def factor(self) -> Tensor:
        """The lower Cholesky factor of H."""
        return torch.linalg.cholesky(self.dense)

    def solve(self, gradient: Tensor) -> Tensor:
        """Return H⁻¹ g for g of shape [C, D+1], by the factor of H if it is small, else by conjugate gradients.

        Raises:
            UserError: the residual is not small after 10,000 steps.
        """
        if self.size <= EXACT:
            return torch.cholesky_solve(gradient.reshape(-1, 1), self.factor).view_as(gradient)

        def product(flat: np.ndarray) -> np.ndarray:
            return self.product(torch.from_numpy(flat).view_as(gradient)).flatten().numpy()

        operator = LinearOperator((self.size, self.size), product, dtype=np.float64)
        solution, is_missing = cg(operator, gradient.flatten().numpy(), rtol=CLOSE, maxiter=STEPS)
        if is_missing:
            raise UserError(f"conjugate gradients have not converged after {STEPS:,} steps: give a larger --damping")
        return torch.from_numpy(solution).view_as(gradient)


def influence(view: HeadView, held_out: HeadView, hessian: HeadHessian) -> Tensor:
    """Return I_i of every sample on the mean loss of held-out samples, [n]; one solve and one pass."""
    solved = hessian.solve(held_out.mean())
    along = view.project(solved)  # <H⁻¹ ∇L, g_i>
    return along.mean() - along


def self_influence(view: HeadView, hessian: HeadHessian) -> Tensor:
    """Return g_iᵀ H⁻¹ g_i, [n]: n times the gain that a sample has from its own training, to first order.

    Section 5.4 of the paper ranks wrong labels by it. Needs the factor of H: n p² operations for p parameters.

    Raises:
        UserError: the head has too many parameters.
    """
    if hessian.size > EXACT:
        limit = f"self-influence factors a Hessian of at most {EXACT:,}"
        raise UserError(f"by = self: the head has {hessian.size:,} parameters, {limit}: give --by loss or influence")
    values = []
    for part in torch.arange(len(view)).split(max(1, AT_ONCE // hessian.size)):
        some = view[part]
        inputs = torch.cat([some.features, torch.ones_like(some.logits[:, :1])], 1)
        gradients = (some.residual[:, :, None] * inputs[:, None, :]).flatten(1)  # [b, p]
        whitened = torch.linalg.solve_triangular(hessian.factor, gradients.T, upper=False)
        values.append(whitened.square().sum(0))
    return torch.cat(values)
