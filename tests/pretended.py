"""A pretended GPU: its tensors lie in host memory, but mixing them with the host's own fails, as on a real one.

Everything is computed, backward passes included, so results must be those of the CPU. An index must lie on the device:
PyTorch takes one from the host as well, and makes the host wait for its copy.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from raypkg.data.kinds import _normalisation

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
MEMORY = 2**34  # bytes
COPIES = {aten._to_copy.default, aten.copy_.default}
# Beside pointwise operations, these take a single number of the host.
TAKE_NUMBERS = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default, aten.fill_.Tensor}
WAIT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


CUDA = {  # functions of torch.cuda that need a driver
    "_lazy_init": lambda: None,
    "get_device_properties": lambda device: SimpleNamespace(total_memory=MEMORY),
    "mem_get_info": lambda device: (MEMORY, MEMORY),
    "get_device_name": lambda device: "pretended",
    "is_bf16_supported": lambda **_: False,
    "get_rng_state": lambda device: torch.get_rng_state(),  # draws are the host's
    "set_rng_state": lambda state, device: torch.set_rng_state(state),
}


class There(Tensor):
    """A tensor on the pretended device, whose numbers are those of ``value``.

    To PyTorch's C++ it is a meta tensor: such a backward pass needs no driver, and what C++ creates beside one is
    recognised by that device.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = DEVICE

    @staticmethod
    def __new__(cls, value: Tensor):
        layout = {"strides": value.stride(), "storage_offset": value.storage_offset(), "dtype": value.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, value.size(), device="meta", **layout)
        tensor.value = value
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function}: beyond the block of `pretended`")

    def __repr__(self):
        return f"There({self.value})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        Tensor.data.__set__(self, new)
        self.value = new.value

    def new_tensor(self, values, *, dtype=None):
        return torch.tensor(values, dtype=dtype or self.dtype, device=DEVICE)

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.value.__reduce_ex__(protocol)  # files are read to the host

    def untyped_storage(self):
        return self.value.untyped_storage()


class Dispatch(TorchDispatchMode):
    """Computes for the device, and lists in ``waits`` the operations for which the host waits."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        there = {id(tensor.value): tensor for tensor in tensors if isinstance(tensor, There)}
        device = kwargs.get("device")
        lands = bool(there) if device is None else torch.device(device).type in ("cuda", "meta")
        if not (there or lands):
            return function(*args, **kwargs)
        if lands and any(isinstance(leaf, torch.Generator) for leaf in leaves):
            raise RuntimeError(f"{function}: a generator of the host cannot draw on the device")
        takes_numbers = function in TAKE_NUMBERS or torch.Tag.pointwise in function.tags
        for tensor in tensors if there and function not in COPIES else ():
            if not isinstance(tensor, There) and (tensor.dim() or not takes_numbers):
                raise RuntimeError(f"{function}: a host tensor {list(tensor.shape)} among those of the device")

        if device is not None:
            kwargs["device"] = "cpu"
        values, named = tree_map(lambda leaf: leaf.value if isinstance(leaf, There) else leaf, (args, kwargs))
        out = function(*values, **named)
        if function is aten.copy_.default:
            lands = isinstance(args[0], There)
        integral = function is aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1])
        number = function is not aten._fused_sdp_choice.default and isinstance(out, bool | int | float)
        if not lands or number or (WAIT & {*function.tags} and not integral):
            self.waits.append(str(function))
        if not lands:
            return out

        def placed(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return there[id(leaf)] if id(leaf) in there else There(leaf)

        return tree_map(placed, out)


def _in_line(load: Callable, jobs: Iterable, *_: Any) -> Iterator:
    """Load batches one after another: the dispatch is of one thread."""
    return map(load, jobs)


@contextmanager
def pretended() -> Iterator[Dispatch]:
    """Make ``DEVICE`` a device inside the block."""
    dispatch = Dispatch()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) is then a copy like others
    try:
        with ExitStack() as stack:
            stack.enter_context(patch("raypkg.engine.batches.fetched", _in_line))
            stack.enter_context(patch("raypkg.methods.sparse.training.Tensor", There))  # it refuses other subclasses
            stack.enter_context(patch.object(Tensor, "pin_memory", lambda self: self))
            for name, value in CUDA.items():
                stack.enter_context(patch.object(torch.cuda, name, value))
            stack.enter_context(dispatch)
            yield dispatch
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        _normalisation.cache_clear()
