"""Last-layer gradients of the cross-entropy loss, kept factored.

For a linear head with logits z = W h + b, the gradient of sample i with respect to [W, b] is the rank-one matrix

    g_i = (p_i − e_{y_i}) ⊗ [h_i; 1]        p = softmax(z), e_y one-hot        [C, D+1]

so n·(C + D) numbers stand for n·C·(D + 1), and every quantity below has a closed form in the two factors.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from raypkg.core.errors import UserError
from raypkg.models.classifier import in_mode

AT_ONCE = 2**26  # numbers of full gradients that are in memory at a time
TILE = 2048  # columns of distances computed together: temporaries stay in the cache and do not fragment the heap
SHORT = 16  # rows of fewer logits: their exponentials are computed one at a time; class by class, many at once
PER_SAMPLE = {"residual", "_squares", "_norms", "_lowered_squares"}  # cached properties that indexing carries over


@dataclass(frozen=True, eq=False)
class HeadView:
    """Input and output of the last layer for n samples, and their gradients g_i in closed form.

    Raises:
        UserError: shapes or dtypes do not fit, a label is out of range, a number is NaN or infinite.

    >>> HeadView(torch.zeros(3, 2), torch.ones(3, 4), torch.tensor([0, 1, 1])).residual
    tensor([[-0.5000,  0.5000],
            [ 0.5000, -0.5000],
            [ 0.5000, -0.5000]])
    """

    logits: Tensor  # float32 or float64 [n, C]
    features: Tensor  # the head's input h, of the same dtype [n, D]; with D = 0 the gradients are those of the logits
    y: Tensor  # int64 [n], in 0 … C−1

    def __post_init__(self):
        logits, features, y = self.logits, self.features, self.y
        ranks = (logits.dim(), features.dim(), y.dim()) == (2, 2, 1) and len(logits) == len(features) == len(y)
        real = logits.dtype in (torch.float32, torch.float64)
        if not (ranks and real and features.dtype == logits.dtype and y.dtype == torch.int64):
            given = ", ".join(f"{each.dtype} {list(each.shape)}" for each in (logits, features, y))
            raise UserError(f"logits, features and y are {given}: expected float [n, C], float [n, D], int64 [n]")
        _check_samples("label out of range", (y >= 0) & (y < self.num_classes))
        _check_samples("NaN or infinite logits", _all_finite(logits))
        _check_samples("NaN or infinite features", _all_finite(features))
        _check_samples("features whose squares overflow", self._squares.isfinite())

    def __len__(self) -> int:
        return len(self.y)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.logits.shape[1]

    @property
    def width(self) -> int:
        """D."""
        return self.features.shape[1]

    def __getitem__(self, indices: Tensor | slice) -> "HeadView":
        part = self._with(self.logits[indices], self.features[indices], self.y[indices])
        computed = self.__dict__.keys() & PER_SAMPLE
        part.__dict__.update({name: self.__dict__[name][indices] for name in computed})
        return part

    @classmethod
    def _with(cls, logits: Tensor, features: Tensor, y: Tensor) -> "HeadView":
        """Return a view of validated parts: validating again would read all features again."""
        view = cls.__new__(cls)
        view.__dict__.update(logits=logits, features=features, y=y)
        return view

    @classmethod
    def concat(cls, views: Sequence["HeadView"]) -> "HeadView":
        """Join views of disjoint samples, in the given order."""
        return cls(
            logits=torch.cat([view.logits for view in views]),
            features=torch.cat([view.features for view in views]),
            y=torch.cat([view.y for view in views]),
        )

    def to(self, device: torch.device) -> "HeadView":
        """Return the view on a device; the view itself if it is there."""
        if device == self.y.device:
            return self
        return self._with(self.logits.to(device), self.features.to(device), self.y.to(device))

    def double(self) -> "HeadView":
        """Return the view in float64."""
        return self._with(self.logits.double(), self.features.double(), self.y)

    @cached_property
    def _squares(self) -> Tensor:  # ‖h_i‖² [n]
        return self.features.square().sum(dim=1)

    @cached_property
    def residual(self) -> Tensor:
        """The gradient with respect to the logits, p − e_y [n, C]."""
        own = self.y[:, None]
        p = over_classes(torch.softmax, self.logits)  # [n, C]
        p.scatter_(1, own, 0.0)
        others = p.sum(dim=1, keepdim=True)  # Σ_{c≠y} p_c has digits that 1 − p_y loses where p_y is near 1
        return p.scatter_(1, own, -others)

    def norms(self) -> Tensor:
        """Return ‖g_i‖ = ‖p_i − e_i‖ · sqrt(‖h_i‖² + 1), [n]."""
        return self._norms

    @cached_property
    def _norms(self) -> Tensor:
        factor = (self._squares + 1).sqrt()  # ‖[h; 1]‖
        return self.residual.norm(dim=1) * factor

    @property
    def rounding(self) -> float:
        """The error of <g_i, g_j>, relative to ‖g_i‖·‖g_j‖: it grows with the root of the number of terms, C + D."""
        terms = self.num_classes + self.width
        unit = torch.finfo(self.logits.dtype).eps
        return unit * (2 + terms**0.5)

    @cached_property
    def _lowered_squares(self) -> Tensor:
        squares = self.norms().square()
        return squares * (1 - self.rounding)

    def inner(self, other: "HeadView | None" = None) -> Tensor:
        """Return <g_i, g_j> = <p_i − e_i, p_j − e_j> · (<h_i, h_j> + 1) with all of ``other``, or of itself [n, m]."""
        of_features, of_residuals = self._factors(self if other is None else other)
        return of_features.mul_(of_residuals)

    def distances(self, other: "HeadView | None" = None, *, out: Tensor | None = None) -> Tensor:
        """Return ‖g_i − g_j‖ from norms and inner products, [n, m].

        Each square ‖g_i‖² − 2<g_i, g_j> + ‖g_j‖² is lowered by its rounding error, so equal gradients are at distance
        0, and so is all below about sqrt(rounding) · ‖g‖. Temporaries have n · ``TILE`` numbers.
        """
        other = self if other is None else other
        squares = torch.add(self._lowered_squares[:, None], other._lowered_squares, out=out)  # [n, m]
        for start in range(0, len(other), TILE):
            tile = squares[:, start : start + TILE]
            tile.addcmul_(*self._factors(other[start : start + TILE]), value=-2)
            tile.clamp_(min=0).sqrt_()
        return squares

    def _factors(self, other: "HeadView") -> tuple[Tensor, Tensor]:
        """Return <h_i, h_j> + 1 and <p_i − e_i, p_j − e_j> [n, m]."""
        products = self.features @ other.features.T
        return products.add_(1), self.residual @ other.residual.T

    def project(self, matrix: Tensor) -> Tensor:
        """Return <g_i, M> = (p_i − e_i)ᵀ M [h_i; 1] for M of shape [C, D+1], [n]."""
        return (self.residual * self.through(matrix)).sum(dim=1)

    def sum(self, weights: Tensor | None = None) -> Tensor:
        """Return Σ w_i g_i, with w = 1 by default [C, D+1]."""
        residual = self.residual
        if weights is not None:
            residual = residual * weights[:, None].to(residual)
        of_weight = residual.T @ self.features  # with respect to W [C, D]
        of_bias = residual.sum(dim=0)  # and to b [C]
        return torch.cat([of_weight, of_bias[:, None]], dim=1)

    def mean(self, weights: Tensor | None = None) -> Tensor:
        """Return the gradient Σ w_i g_i / n of the weighted objective [C, D+1]: not divided by Σ w_i."""
        return self.sum(weights) / len(self)

    def arranged(self) -> "HeadView":
        """Return the view with logits of few classes class by class in memory, for sums over its samples.

        Values of a sample may then round differently depending on its position.
        """
        if self.num_classes >= SHORT:
            return self
        return self._with(self.logits.T.contiguous().T, self.features, self.y)

    def shifted(self, change: Tensor) -> "HeadView":
        """Return the view with ``change`` [n, C] added to the logits."""
        logits = self.logits + change
        _check_samples("NaN or infinite logits", _all_finite(logits))
        return self._with(logits, self.features, self.y)

    def through(self, matrix: Tensor) -> Tensor:
        """Return M [h_i; 1] of every sample for M of shape [C, D+1], [n, C]."""
        weight = matrix[:, :-1]
        bias = matrix[:, -1:]
        by_class = weight @ self.features.T  # [C, n]: faster in this order
        return by_class.add_(bias).T

    def along(self, samples: "HeadView") -> Tensor:
        """Return M [h_i; 1] with M = Σ_j g_j over other samples [n, C]; if they are few, without spelling M out."""
        if len(samples) * (self.num_classes + self.width) > self.num_classes * self.width:
            return self.through(samples.sum())
        products = self.features @ samples.features.T  # <h_i, h_j> [n, m]
        return products.add_(1) @ samples.residual


def over_classes(function: Callable[[Tensor, int], Tensor], logits: Tensor) -> Tensor:
    """Return function(logits, dim=1), such as softmax, of logits [n, C], in their order in memory."""
    by_class = logits.T.is_contiguous() and not logits.is_contiguous()
    return function(logits.T, 0).T if by_class else function(logits, 1)


def head_view(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> HeadView:
    """Compute the HeadView of a model in one forward pass, in evaluation mode.

    Args:
        model: with ``features(x)`` [b, D] and a linear ``head`` of them [b, C]; its modes are restored afterwards.
        batches: pairs (x, y), on the model's device.

    Returns:
        Logits and features in float32, on the CPU, in the order of the batches.

    Raises:
        UserError: the model has no ``features`` and ``head``, there is no batch, or an output is NaN or infinite.

    >>> from raypkg.models import build_model
    >>> view = head_view(build_model("mlp", (4,), 3, seed=0), [(torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))])
    >>> list(view.logits.shape), list(view.features.shape)
    ([5, 3], [5, 100])
    """
    if not (hasattr(model, "features") and hasattr(model, "head")):
        raise UserError(f"{type(model).__name__} is not of the form head(features(x)), as classifiers here are")
    network: Any = model
    outputs = []
    with in_mode(model, training=False), torch.no_grad():  # not inference_mode: what a model caches must still train
        for x, y in batches:
            features = network.features(x)  # [b, D]
            logits = network.head(features)  # [b, C]
            outputs.append((logits.float().cpu(), features.float().cpu(), y.cpu()))
    if not outputs:
        raise UserError("no batches to compute logits and features of")
    return HeadView(*map(torch.cat, zip(*outputs, strict=True)))


def gradient_norms(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return ‖∇ℓ_i‖ over all trained parameters of each sample of batches (x, y), float [n], on the CPU.

    The model is in evaluation mode, because no sample has batch statistics of its own. The gradients of a few samples,
    at most ``AT_ONCE`` numbers, are in memory at a time.

    Raises:
        UserError: a layer has no gradient of a single sample.
    """
    # ``vmap`` has no rule for some layers in the memory layout "channels last".
    trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
    size = sum(p.numel() for p in trained.values())

    def loss(parameters: dict[str, Tensor], x: Any, y: Tensor) -> Tensor:
        one = {name: value[None] for name, value in x.items()} if isinstance(x, dict) else x[None]
        return cross_entropy(functional_call(model, parameters, (one,)), y[None])

    def norm(x: Tensor, y: Tensor) -> Tensor:
        squares = [each.square().sum() for each in grad(loss)(trained, x, y).values()]
        return torch.stack(squares).sum().sqrt()

    norms = vmap(norm, chunk_size=max(1, AT_ONCE // size))
    found = []
    # Other kernels of attention have no rule for ``vmap``.
    with in_mode(model, training=False), sdpa_kernel(SDPBackend.MATH):
        for x, y in batches:
            try:
                found.append(norms(x if isinstance(x, dict) else x.contiguous(), y).cpu())
            except RuntimeError as error:
                reason = str(error).partition("\n")[0]
                raise UserError(f"{type(model).__name__} has no full gradients of single samples: {reason}") from error
    return torch.cat(found)


def _all_finite(rows: Tensor) -> Tensor:
    """Return for each row [n, p] whether it is free of NaN and infinity, several times as fast as ``isfinite``."""
    nothing = (rows * 0).sum(dim=1)
    return nothing == 0


def _check_samples(what: str, good: Tensor) -> None:
    if good.all():
        return
    bad = (~good).nonzero()[:, 0]
    raise UserError(f"sample {bad[0].item()}: {what} ({len(bad)} of {len(good)} samples)")
