"""Floating-point operations of a forward pass, counted layer by layer."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .masks import LAYERS


def forward_flops(model: nn.Module, shape: tuple[int, ...]) -> dict[str, int]:
    """Return 2 operations for each use of a weight of linear and convolutional layers, by the weight's name.

    Biases, norms and activations are left out, as is usual, and layers that are not called, such as those that
    attention uses by their weights. Training takes 3 times as much: the gradient of the weights and that of the inputs
    cost a forward pass each.

    Args:
        model: left as it was.
        shape: of one sample.

    >>> forward_flops(nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2)), (5,))
    {'0.weight': 30, '2.weight': 12}
    """
    replica, counts = copy.deepcopy(model).to("cpu", torch.float32).eval(), dict[str, int]()

    def count(name: str, layer: nn.Module, output: Tensor) -> None:
        weight = layer.get_parameter("weight")
        uses = output.numel() // weight.shape[0]  # each weight is used at every place of the output, 1 sample
        counts[name] = counts.get(name, 0) + 2 * weight.numel() * uses

    for name, layer in replica.named_modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(
                lambda layer, _, output, name=f"{name}.weight" if name else "weight": count(name, layer, output)
            )
    with torch.inference_mode():
        replica(torch.zeros(1, *shape))
    return counts


def active_flops(flops: Mapping[str, int], masks: Mapping[str, Tensor]) -> int:
    """Return what is left of a forward pass's operations when only active weights are multiplied."""
    shares = {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    return round(sum(count * shares.get(name, 1.0) for name, count in flops.items()))
