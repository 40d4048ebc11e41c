"""Models whose pruned weights are not there: compressed sparse rows, on the disk and in linear layers."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
PARTS = ("rows", "columns", "values")


def compressed(state: State, names: set[str]) -> State:
    """Return a model's tensors with those of the names in compressed rows, zeros left out.

    ``w`` [out, …] becomes ``w.rows`` int32 [out + 1], ``w.columns`` int16 or int32 [k], ``w.values`` [k] and
    ``w.shape``.

    >>> found = compressed({"w": torch.tensor([[0.0, 2.0], [0.0, 0.0], [3.0, 0.0]])}, {"w"})
    >>> [found[f"w.{part}"].tolist() for part in ("rows", "columns", "values", "shape")]
    [[0, 1, 1, 2], [1, 0], [2.0, 3.0], [3, 2]]
    """
    out = {}
    for name, tensor in state.items():
        if name not in names:
            out[name] = tensor.contiguous()
            continue
        matrix = in_rows(tensor.flatten(1))
        narrow = torch.int16 if matrix.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
        out[f"{name}.rows"] = matrix.crow_indices().to(torch.int32)
        out[f"{name}.columns"] = matrix.col_indices().to(narrow)
        out[f"{name}.values"] = matrix.values()
        out[f"{name}.shape"] = torch.tensor(tensor.shape)
    return out


def expanded(state: State) -> State:
    """Return the dense tensors of ``compressed``."""
    names = [name.removesuffix(".shape") for name in state if name.endswith(".shape")]
    out = {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] not in names}
    for name in names:
        out[name] = _matrix(state, name).to_dense().view(state[f"{name}.shape"].tolist())
    return out


def in_rows(weight: Tensor) -> Tensor:
    """Return a matrix in compressed sparse rows."""
    _say_that_it_is_beta()
    return weight.to_sparse_csr()


def csr(rows: Tensor, columns: Tensor, values: Tensor, shape: Sequence[int], *, check: bool = False) -> Tensor:
    """Return a matrix from its compressed sparse rows, checked where they come from outside."""
    _say_that_it_is_beta()
    return torch.sparse_csr_tensor(rows, columns, values, tuple(shape), check_invariants=check)


@cache
def _say_that_it_is_beta() -> None:
    """Let PyTorch say its only warning of these tensors where nobody hears it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        torch.eye(1).to_sparse_csr()


def exchange_linear(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Put others in the place of all linear layers; convolutions stay, as there is no sparse kernel for them."""
    for name, child in model.named_children():
        setattr(model, name, make(child) if type(child) is nn.Linear else exchange_linear(child, make))
    return model


def _matrix(state: State, name: str) -> Tensor:
    rows, columns, values = (state[f"{name}.{part}"] for part in PARTS)
    shape = state[f"{name}.shape"].tolist()
    return csr(rows.long(), columns.long(), values, (shape[0], math.prod(shape[1:])), check=True)
