"""Linear layers that compute with the weights that exist, forward and backward, while they are trained.

    y = W x        ∂x = Wᵀ ∂y        ∂W_ij = ∂y_i · x_j  where W_ij exists

The parameter holds all weights, as checkpoints and changes of the masks need them, or only the k that exist, so that
optimisers walk over no others. What is multiplied is in compressed sparse rows, in its own precision: autocast does not
reach it.
"""

import math
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

    def values(self, weight: Tensor) -> Tensor:
        """Return the weights that exist, [k]."""
        return weight.flatten()[self.places]

    def whole(self, values: Tensor) -> Tensor:
        """Return all weights [out, in], zeros where none exist.

        >>> pattern = pattern_of(torch.tensor([[True, False], [False, True]]))
        >>> pattern.whole(torch.tensor([1.0, 2.0])).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
        """
        shape = len(self.rows) - 1, len(self.back_rows) - 1
        return values.new_zeros(math.prod(shape)).index_put_((self.places,), values).view(shape)


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
        self.whole_gradient = False  # of all weights, in the coming backward pass: for growth that looks at it

    def forward(self, x: Tensor) -> Tensor:
        """Map […, in] to […, out]."""
        if self.pattern is None:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features).to(self.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _Product.apply(rows, self.weight, self.pattern, self.whole_gradient)
            return (y if self.bias is None else y + self.bias).view(*x.shape[:-1], -1)


def of_active(layer: nn.Linear) -> ActiveLinear:
    """Return a layer that holds the weights that are not zero, and no others."""
    active = ActiveLinear(layer)
    active.pattern = pattern_of(layer.weight != 0)
    active.weight = nn.Parameter(active.pattern.values(layer.weight.data), requires_grad=False)
    return active


class _Product(torch.autograd.Function):
    """W x of the weights that exist, of a parameter that holds all of them or only those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pattern: Pattern, whole_gradient: bool) -> Tensor:
        only = weight.dim() == 1
        values = weight if only else pattern.values(weight)
        ctx.save_for_backward(x, values)
        ctx.pattern, ctx.only, ctx.whole_gradient = pattern, only, whole_gradient
        shape = len(pattern.rows) - 1, len(pattern.back_rows) - 1
        return (csr(pattern.rows, pattern.columns, values, shape) @ x.T).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (gradient,), (x, values), pattern = gradients, ctx.saved_tensors, ctx.pattern
        g = gradient.T.contiguous()  # [out, b]
        back = None
        if ctx.needs_input_grad[0]:
            shape = x.shape[1], len(g)
            back = (csr(pattern.back_rows, pattern.back_columns, values[pattern.order], shape) @ g).T
        if ctx.whole_gradient:
            return back, g @ x, None, None
        empty = csr(pattern.rows, pattern.columns, torch.zeros_like(values), (len(g), x.shape[1]))
        sampled = torch.sparse.sampled_addmm(empty, g, x, beta=0.0).values()
        return back, sampled if ctx.only else pattern.whole(sampled), None, None


def _starts(rows: Tensor, count: int) -> Tensor:
    return F.pad(rows.bincount(minlength=count).cumsum(0), (1, 0)).int()
