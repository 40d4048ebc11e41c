"""Cost of passes through any module: operations counted by weight, and activations computed again, not kept."""

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from raypkg.core.errors import UserError
from raypkg.data.kinds import kind_of

from .classifier import Shape, in_mode

CONTAINERS = (nn.Sequential, nn.ModuleList)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def forward_flops(model: nn.Module, shape: Shape) -> dict[str, int]:
    """Return the operations of the forward pass of one sample, by weight: 2 per use of a weight.

    Linear, convolutional and attention layers count. As usual, biases, norms, activations and attention's products
    without weights do not. Training takes three times as many: the gradients of the weights and of the inputs cost a
    forward pass each.

    >>> forward_flops(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), (5,))
    {'0.weight': 30, '2.weight': 12}
    """
    counts: Counter[str] = Counter()  # a sum, as a layer may be called more than once

    def count(name: str, layer: nn.Module, _: object, output: Tensor) -> None:
        weight: Any = layer.weight  # [out, …], of transformers' Conv1D [in, out]
        uses = output.numel() // weight.shape[0 if isinstance(layer, LAYERS) else 1]  # once per position of the output
        counts[f"{name}.weight".lstrip(".")] += 2 * weight.numel() * uses

    def count_attention(
        name: str, layer: nn.MultiheadAttention, inputs: Sequence[Any], keywords: Mapping[str, Any], _: object
    ) -> None:
        # Attention multiplies by the weights of its projections itself, so their layers are never called.
        given = inspect.signature(layer.forward).bind(*inputs, **keywords).arguments
        operations = {}  # per projection, to width E
        for kind in ("query", "key", "value"):
            operations[f"{kind[0]}_proj_weight"] = 2 * layer.embed_dim * given[kind].numel()
        if layer.in_proj_weight is not None:
            operations = {"in_proj_weight": sum(operations.values())}
        operations["out_proj.weight"] = 2 * layer.embed_dim * given["query"].numel()
        for weight, uses in operations.items():
            counts[f"{name}.{weight}".lstrip(".")] += uses

    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS) or type(layer).__name__ == "Conv1D":  # GPT-2's, a linear layer transposed
            handles.append(layer.register_forward_hook(partial(count, name)))
        elif isinstance(layer, nn.MultiheadAttention):
            handles.append(layer.register_forward_hook(partial(count_attention, name), with_kwargs=True))
    x = kind_of(shape).example(1, shape)
    weight = next(model.parameters())
    x = x.to(weight.device, weight.dtype if x.is_floating_point() else None)
    try:
        with in_mode(model, training=False), torch.no_grad():  # not inference mode: a layer may cache what it computes
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return dict(counts)


def checkpoint_blocks(model: nn.Module) -> None:
    """Change the blocks of a model so that training keeps their inputs alone (arXiv:1604.06174).

    That takes less memory and more time, and gives equal gradients.

    Blocks are the layers of a model of transformers. Of other models they are the outermost modules with parts of
    their own in a sequence or list, such as residual blocks.

    Raises:
        UserError: the model has no blocks.
    """
    for module in model.modules():
        if enable := getattr(module, "gradient_checkpointing_enable", None):  # transformers keeps caches out of it
            if not module.supports_gradient_checkpointing:
                raise UserError(f"checkpointing = true: {type(module).__name__} of transformers does not support it")
            with warnings.catch_warnings():  # the name that transformers 5.0 has alone is deprecated in later versions
                warnings.simplefilter("ignore", FutureWarning)
                enable({"use_reentrant": False})
            return
    blocks = [*blocks_of(model)]
    if not blocks:
        raise UserError("checkpointing = true would do nothing: the model has no blocks, such as residual ones")
    for block in blocks:
        if not isinstance(block, Recomputed):
            kind = type(block)
            block.__class__ = type(kind.__name__, (Recomputed, kind), {})  # parameters keep their names


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost modules with parts of their own in a sequence or list."""
    for child in module.children():
        if isinstance(module, CONTAINERS) and type(child) not in CONTAINERS and any(child.children()):
            yield child
        else:
            yield from blocks_of(child)


class Recomputed(nn.Module):
    """The first base of a block that is computed twice in training."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return the block's output; only the inputs are kept for the backward pass."""
        forward = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return forward(*args, **options)
        passes = (nullcontext(), _without_statistics(self))
        return checkpoint(forward, *args, use_reentrant=False, context_fn=lambda: passes, **options)


@contextmanager
def _without_statistics(block: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norms as they are: the first pass has updated them."""
    norms: list[Any] = [part for part in block.modules() if getattr(part, "track_running_stats", False)]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # of the new statistics
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
