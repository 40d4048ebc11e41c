"""Linear layers that compute with the weights that exist, forward and backward, while they are trained.

    y = W x        ∂x = Wᵀ ∂y        ∂W_ij = ∂y_i · x_j  where W_ij exists

The weights are stored as a dense parameter, so that optimisers, checkpoints and masks know no difference; what is
multiplied is in compressed sparse rows, in their own precision: autocast does not reach it.
"""

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pattern(NamedTuple):
    """Where the weights of a layer are, k of them: in rows, and in the rows of the transposed matrix.

    Attributes:
        places: in the flattened weight, int64 [k].
        rows: int32 [out + 1].
        columns: int32 [k].
        back_rows: int32 [in + 1].
        back_columns: int32 [k].
        order: of the weights in the transposed matrix, int64 [k].
    """

    places: Tensor
    rows: Tensor
    columns: Tensor
    back_rows: Tensor
    back_columns: Tensor
    order: Tensor


def pattern_of(mask: Tensor) -> Pattern:
    """Return the pattern of a mask [out, in]."""
    there, back = mask.nonzero(), mask.T.nonzero()  # [k, 2], by rows
    number = torch.empty(mask.shape, dtype=torch.int64, device=mask.device)
    number[mask] = torch.arange(len(there), device=mask.device)
    return Pattern(
        places=mask.flatten().nonzero()[:, 0],
        rows=_starts(mask),
        columns=there[:, 1].int(),
        back_rows=_starts(mask.T),
        back_columns=back[:, 1].int(),
        order=number.T[mask.T],
    )


class ActiveLinear(nn.Linear):
    """A linear layer of which only the weights of a mask are multiplied; all of them before it has one.

    Args:
        layer: whose parameters it takes over.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.pattern: Pattern | None = None
        self.dense_gradient = False  # of all weights, in the coming backward pass: for growth that looks at it

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, in] to [b, out]."""
        if self.pattern is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _Product.apply(x.to(self.weight.dtype), self.weight, self.pattern, self.dense_gradient)
            return y if self.bias is None else y + self.bias


def with_active_layers(model: nn.Module) -> nn.Module:
    """Put such layers in the place of all linear ones."""
    for name, child in model.named_children():
        setattr(model, name, ActiveLinear(child) if type(child) is nn.Linear else with_active_layers(child))
    return model


class _Product(torch.autograd.Function):
    """W x of the weights that exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pattern: Pattern, dense_gradient: bool) -> Tensor:
        values = weight.flatten()[pattern.places]
        ctx.save_for_backward(x, weight, values)
        ctx.pattern, ctx.dense_gradient = pattern, dense_gradient
        return (_csr(pattern.rows, pattern.columns, values, weight.shape) @ x.T).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (gradient,), (x, weight, values), pattern = gradients, ctx.saved_tensors, ctx.pattern
        g = gradient.T.contiguous()  # [out, b]
        back = None
        if ctx.needs_input_grad[0]:
            transposed = _csr(pattern.back_rows, pattern.back_columns, values[pattern.order], weight.T.shape)
            back = (transposed @ g).T
        if ctx.dense_gradient:
            return back, g @ x, None, None
        empty = _csr(pattern.rows, pattern.columns, torch.zeros_like(values), weight.shape)
        sampled = torch.sparse.sampled_addmm(empty, g, x, beta=0.0).values()
        out = torch.zeros_like(weight)
        out.view(-1)[pattern.places] = sampled
        return back, out, None, None


def _csr(rows: Tensor, columns: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(rows, columns, values, tuple(shape), check_invariants=False)


def _starts(mask: Tensor) -> Tensor:
    return F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
