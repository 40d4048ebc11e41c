"""Linear layers that compute with the weights that exist, forward and backward, while they are trained.

    y = W x        ∂x = Wᵀ ∂y        ∂W_ij = ∂y_i · x_j  where W_ij exists

The weights are stored as a dense parameter, so that optimisers, checkpoints and masks know no difference; what is
multiplied is in compressed sparse rows, in their own precision: autocast does not reach it.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .csr import csr


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
    (height, width), (rows, columns) = mask.shape, mask.nonzero().T  # by rows
    order = columns.argsort(stable=True)
    return Pattern(
        places=rows * width + columns,
        rows=_starts(rows, height),
        columns=columns.int(),
        back_rows=_starts(columns, width),
        back_columns=rows[order].int(),
        order=order,
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


class _Product(torch.autograd.Function):
    """W x of the weights that exist."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pattern: Pattern, dense_gradient: bool) -> Tensor:
        values = weight.flatten()[pattern.places]
        ctx.save_for_backward(x, weight, values)
        ctx.pattern, ctx.dense_gradient = pattern, dense_gradient
        return (csr(pattern.rows, pattern.columns, values, weight.shape) @ x.T).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (gradient,), (x, weight, values), pattern = gradients, ctx.saved_tensors, ctx.pattern
        g = gradient.T.contiguous()  # [out, b]
        back = None
        if ctx.needs_input_grad[0]:
            transposed = csr(pattern.back_rows, pattern.back_columns, values[pattern.order], weight.T.shape)
            back = (transposed @ g).T
        if ctx.dense_gradient:
            return back, g @ x, None, None
        empty = csr(pattern.rows, pattern.columns, torch.zeros_like(values), weight.shape)
        sampled = torch.sparse.sampled_addmm(empty, g, x, beta=0.0).values()
        out = torch.zeros_like(weight)
        out.view(-1)[pattern.places] = sampled
        return back, out, None, None


def _starts(rows: Tensor, count: int) -> Tensor:
    return F.pad(rows.bincount(minlength=count).cumsum(0), (1, 0)).int()
