"""Computing and storing without pruned weights: compressed sparse rows, sparse linear layers.

    y = W x        ∂x = Wᵀ ∂y        ∂W_ij = ∂y_i · x_j  where W_ij is active

Only linear layers are sparse: there is no such kernel for convolutions. Their products have their own precision, which
autocast does not change.
"""

import math
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, Tensor]
NARROW = torch.iinfo(torch.int16).max

# PyTorch warns of these tensors once per process: trigger that here, where no user sees it.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    torch.eye(1).to_sparse_csr()


# Files


def compressed(state: State, names: set[str]) -> State:
    """Return a model's tensors, the named ones in compressed sparse rows without zeros.

    ``w`` [out, …] becomes ``w.rows`` int32 [out + 1], ``w.columns`` int16 or int32 [k], ``w.values`` [k] and
    ``w.shape``.

    >>> small = compressed({"w": torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, 0.0]])}, {"w"})
    >>> [small[f"w.{part}"].tolist() for part in ("rows", "columns", "values", "shape")]
    [[0, 1, 1, 2], [1, 0], [2.0, 3.0], [3, 2]]
    """
    small = {}
    for name, tensor in state.items():
        if name not in names:
            small[name] = tensor.contiguous()
            continue
        matrix = tensor.flatten(1).to_sparse_csr()
        columns = matrix.col_indices()
        small[f"{name}.rows"] = matrix.crow_indices().int()
        small[f"{name}.columns"] = columns.short() if matrix.shape[1] <= NARROW else columns.int()
        small[f"{name}.values"] = matrix.values()
        small[f"{name}.shape"] = torch.tensor(tensor.shape)
    return small


def expanded(state: State) -> State:
    """Return the dense tensors of ``compressed``."""
    names = [name.removesuffix(".shape") for name in state if name.endswith(".shape")]
    dense = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in names}
    for name in names:
        shape = state[f"{name}.shape"].tolist()
        matrix = torch.sparse_csr_tensor(
            state[f"{name}.rows"].long(),
            state[f"{name}.columns"].long(),
            state[f"{name}.values"],
            (shape[0], math.prod(shape[1:])),
            check_invariants=True,  # they come from a file
        )
        dense[name] = matrix.to_dense().view(shape)
    return dense


# Linear layers


class Pattern(NamedTuple):
    """The positions of a layer's k active weights, by rows of the weight [out, in] and of its transpose."""

    positions: Tensor  # in the flattened weight, int64 [k]
    rows: Tensor  # start of each row and the end, int32 [out + 1]
    columns: Tensor  # int32 [k]
    back_rows: Tensor  # of the transpose, int32 [in + 1]
    back_columns: Tensor  # of the transpose, int32 [k]
    order: Tensor  # of the weights in the transpose, int64 [k]

    @classmethod
    def of(cls, mask: Tensor) -> "Pattern":
        """Return the pattern of a mask [out, in]."""
        height, width = mask.shape
        rows, columns = mask.nonzero().T  # by rows
        order = columns.argsort(stable=True)  # by columns, which are the rows of the transpose
        starts = [F.pad(rows.bincount(minlength=height).cumsum(0), (1, 0)).int()]
        starts.append(F.pad(columns.bincount(minlength=width).cumsum(0), (1, 0)).int())
        return cls(rows * width + columns, starts[0], columns.int(), starts[1], rows[order].int(), order)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the dense weight, (out, in)."""
        return len(self.rows) - 1, len(self.back_rows) - 1

    def active(self, weight: Tensor) -> Tensor:
        """Return the active weights [k] of a dense weight."""
        return weight.flatten()[self.positions]

    def dense(self, values: Tensor) -> Tensor:
        """Return the dense weight [out, in] of the active weights [k]."""
        weight = values.new_zeros(math.prod(self.shape))
        weight[self.positions] = values
        return weight.view(self.shape)

    def matrix(self, values: Tensor) -> Tensor:
        """Return W [out, in] in compressed sparse rows."""
        return torch.sparse_csr_tensor(self.rows, self.columns, values, self.shape, check_invariants=False)

    def transposed(self, values: Tensor) -> Tensor:
        """Return Wᵀ [in, out] in compressed sparse rows."""
        parts = (self.back_rows, self.back_columns, values[self.order])
        return torch.sparse_csr_tensor(*parts, self.shape[::-1], check_invariants=False)


class ActiveLinear(nn.Linear):
    """A linear layer over another's parameters, which multiplies only the weights of its pattern, if it has one.

    The parameter is the dense weight [out, in], as checkpoints and changes of the masks need it, or only the active
    weights [k], so that optimisers visit no others.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight = layer.weight
        self.bias = layer.bias
        self.pattern: Pattern | None = None
        self.dense_gradient = False  # in the next backward pass: for growth by gradient
        # nn.TransformerEncoderLayer calls layers with hooks, and multiplies by the weights of others itself.
        self.register_forward_pre_hook(lambda layer, inputs: None)

    def convert(self, optimizer: Optimizer, *, dense: bool) -> None:
        """Convert the weight and its optimiser state to the dense form [out, in] or to the active weights [k]."""
        weight, pattern = self.weight, self.pattern
        if pattern is None or dense == (weight.dim() == 2):
            return
        tensors: list[Tensor] = [weight]
        for value in optimizer.state.get(weight, {}).values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                tensors.append(value)
        for tensor in tensors:
            tensor.data = pattern.dense(tensor.data) if dense else pattern.active(tensor.data)

    def forward(self, x: Tensor) -> Tensor:
        """Map […, in] to […, out]."""
        if self.pattern is None:
            return super().forward(x)
        rows = x.reshape(-1, self.in_features).to(self.weight.dtype)  # [b, in]
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = _Product.apply(rows, self.weight, self.pattern, self.dense_gradient)  # [b, out]
            if self.bias is not None:
                y = y + self.bias
            return y.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """W x over the active weights, given the dense weight [out, in] or only the active ones [k]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, pattern: Pattern, dense_gradient: bool) -> Tensor:
        ctx.is_dense = weight.dim() == 2
        values = pattern.active(weight) if ctx.is_dense else weight
        columns = x.T.contiguous()  # [in, b], which this product and that of the backward pass would copy otherwise
        ctx.save_for_backward(columns, values)
        ctx.pattern = pattern
        ctx.dense_gradient = dense_gradient
        return (pattern.matrix(values) @ columns).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        columns, values = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        output_gradient = gradients[0].T.contiguous()  # ∂y, [out, b]
        input_gradient = None
        if ctx.needs_input_grad[0]:
            input_gradient = (pattern.transposed(values) @ output_gradient).T
        if ctx.dense_gradient:
            return input_gradient, output_gradient @ columns.T, None, None
        # ∂y·xᵀ at the positions of the pattern only: the dense [out, in] product is never formed.
        empty = pattern.matrix(torch.zeros_like(values))
        weight_gradient = torch.sparse.sampled_addmm(empty, output_gradient, columns.T, beta=0.0).values()
        if ctx.is_dense:
            weight_gradient = pattern.dense(weight_gradient)
        return input_gradient, weight_gradient, None, None
