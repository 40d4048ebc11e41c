"""Operations of a forward pass, counted by weight."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from raypkg.data.kinds import kind_of

from .classifier import in_mode
from .layers import Shape

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
