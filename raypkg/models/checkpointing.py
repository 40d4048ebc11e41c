"""Activation checkpointing: blocks whose activations are computed again in the backward pass (arXiv:1604.06174)."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from raypkg.core.errors import UserError

CONTAINERS = (nn.Sequential, nn.ModuleList)


def checkpoint_blocks(model: nn.Module) -> None:
    """Change the blocks of a model so that training keeps their inputs alone: less memory, more time, equal gradients.

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
