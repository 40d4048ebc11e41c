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

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the dense weight, (out, in)."""
        return len(self.rows) - 1, len(self.back_rows) - 1

    def values(self, weight: Tensor) -> Tensor:
        """Return the weights that exist, [k]."""
        return weight.flatten()[self.places]

    def whole(self, values: Tensor) -> Tensor:
        """Return all weights [out, in], zeros where none exist.

        >>> pattern = pattern_of(torch.tensor([[True, False], [False, True]]))
        >>> pattern.whole(torch.tensor([1.0, 2.0])).tolist()
        [[1.0, 0.0], [0.0, 2.0]]
        """
        weight = values.new_zeros(math.prod(self.shape))
        weight[self.places] = values
        return weight.view(self.shape)

    def matrix(self, values: Tensor) -> Tensor:
        """Return W [out, in] in compressed sparse rows."""
        return csr(self.rows, self.columns, values, self.shape)

    def transposed(self, values: Tensor) -> Tensor:
        """Return Wᵀ [in, out] in compressed sparse rows."""
        height, width = self.shape
        by_column = values[self.order]
        return csr(self.back_rows, self.back_columns, by_column, (width, height))


def pattern_of(mask: Tensor) -> Pattern:
    """Return the pattern of a mask [out, in]."""
    height, width = mask.shape
    rows, columns = mask.nonzero().T  # by rows
    order = columns.argsort(stable=True)  # by columns, which are the rows of the transposed matrix
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
        self.weight = layer.weight
        self.bias = layer.bias
        self.pattern: Pattern | None = None
        self.whole_gradient = False  # of all weights, in the coming backward pass: for growth by gradient
        self.register_forward_pre_hook(_go_through_forward)

    def forward(self, x: Tensor) -> Tensor:
        """Map […, in] to […, out]."""
        if self.pattern is None:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features).to(self.weight.dtype)  # [b, in]
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _Product.apply(rows, self.weight, self.pattern, self.whole_gradient)  # [b, out]
            if self.bias is not None:
                y = y + self.bias
            return y.view(*x.shape[:-1], -1)


def _go_through_forward(layer: nn.Module, inputs: object) -> None:
    """Do nothing: where a layer has a hook, ``nn.TransformerEncoderLayer`` calls it, and otherwise only its weights."""


def of_active(layer: nn.Linear) -> ActiveLinear:
    """Return a layer that holds the weights that are not zero, and no others."""
    active = ActiveLinear(layer)
    active.pattern = pattern_of(layer.weight != 0)
    values = active.pattern.values(layer.weight.data)
    active.weight = nn.Parameter(values, requires_grad=False)
    return active


class _Product(torch.autograd.Function):
    """W x of the weights that exist, of a parameter that holds all of them or only those."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pattern: Pattern, whole_gradient: bool) -> Tensor:
        holds_active = weight.dim() == 1
        values = weight if holds_active else pattern.values(weight)
        ctx.save_for_backward(x, values)
        ctx.pattern = pattern
        ctx.holds_active = holds_active
        ctx.whole_gradient = whole_gradient
        return (pattern.matrix(values) @ x.T).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, values = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        output_gradient = gradients[0].T.contiguous()  # ∂y, [out, b]
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = (pattern.transposed(values) @ output_gradient).T
        if ctx.whole_gradient:
            return input_gradient, output_gradient @ x, None, None
        # ∂y·xᵀ at the places of the pattern only: the dense [out, in] product is never formed.
        empty = pattern.matrix(torch.zeros_like(values))
        sampled = torch.sparse.sampled_addmm(empty, output_gradient, x, beta=0.0)
        weight_gradient = sampled.values()
        if not ctx.holds_active:
            weight_gradient = pattern.whole(weight_gradient)
        return input_gradient, weight_gradient, None, None


def _starts(rows: Tensor, count: int) -> Tensor:
    """Return where each row starts, and after them the end, int32 [count + 1]."""
    ends = rows.bincount(minlength=count).cumsum(0)
    return F.pad(ends, (1, 0)).int()
