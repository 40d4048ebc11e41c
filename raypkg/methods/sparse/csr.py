"""Models whose pruned weights are not there: compressed sparse rows, on the disk and in linear layers."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
NARROW = torch.iinfo(torch.int16).max


def compressed(state: State, names: set[str]) -> State:
    """Return a model's tensors with those of the names in compressed rows, zeros left out.

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
        matrix = in_rows(tensor.flatten(1))
        narrow = matrix.shape[1] <= NARROW
        columns = matrix.col_indices()
        small[f"{name}.rows"] = matrix.crow_indices().int()
        small[f"{name}.columns"] = columns.short() if narrow else columns.int()
        small[f"{name}.values"] = matrix.values()
        small[f"{name}.shape"] = torch.tensor(tensor.shape)
    return small


def expanded(state: State) -> State:
    """Return the dense tensors of ``compressed``."""
    names = [name.removesuffix(".shape") for name in state if name.endswith(".shape")]
    dense = {}
    for name, tensor in state.items():
        parent, _, _ = name.rpartition(".")
        if parent not in names:
            dense[name] = tensor
    for name in names:
        shape = state[f"{name}.shape"].tolist()
        matrix = _matrix(state, name, shape)
        dense[name] = matrix.to_dense().view(shape)
    return dense


def in_rows(weight: Tensor) -> Tensor:
    """Return a matrix in compressed sparse rows."""
    _silence_beta_warning()
    return weight.to_sparse_csr()


def csr(rows: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int], *, check: bool = False) -> Tensor:
    """Return a matrix from its compressed sparse rows, checked where they come from outside."""
    _silence_beta_warning()
    return torch.sparse_csr_tensor(rows, columns, values, tuple(shape), check_invariants=check)


def exchange_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Replace all linear layers, in place; convolutions stay, as there is no sparse kernel for them."""
    for name, child in model.named_children():
        if type(child) is nn.Linear:
            setattr(model, name, make(child))
        else:
            exchange_linear(child, make)
    return model


def _matrix(state: State, name: str, shape: Sequence[int]) -> Tensor:
    height, *rest = shape
    return csr(
        state[f"{name}.rows"].long(),
        state[f"{name}.columns"].long(),
        state[f"{name}.values"],
        (height, math.prod(rest)),
        check=True,
    )


@cache
def _silence_beta_warning() -> None:
    """Make PyTorch give its warning about these tensors, which it gives once a process, where nobody sees it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.eye(1).to_sparse_csr()
