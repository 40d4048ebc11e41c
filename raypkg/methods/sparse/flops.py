"""What a model takes: its parameters, and the floating-point operations of a forward pass, layer by layer."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from raypkg.data.kinds import kind_of

from .masks import LAYERS, active_counts


class Footprint(NamedTuple):
    """What a model takes in all, and without the weights that do not exist.

    Attributes:
        parameters: biases and norms included.
        active_parameters: those that exist.
        flops: operations of the forward pass of one sample.
        active_flops: those with weights that exist.
    """

    parameters: int
    active_parameters: int
    flops: int
    active_flops: int


def footprint(model: nn.Module, shape: tuple[int, ...], masks: Mapping[str, Tensor]) -> Footprint:
    """Return what a model takes under masks.

    Args:
        model: left as it was.
        shape: of one sample.
        masks: which weights exist; all of a parameter that they do not name.

    >>> footprint(nn.Linear(5, 2), (5,), {"weight": torch.eye(2, 5) > 0})
    Footprint(parameters=12, active_parameters=4, flops=20, active_flops=4)
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    flops = forward_flops(model, shape)
    return Footprint(
        parameters=parameters,
        active_parameters=parameters - pruned,
        flops=sum(flops.values()),
        active_flops=active_flops(flops, masks),
    )


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
    replica = copy.deepcopy(model).to("cpu", torch.float32).eval()
    counts: dict[str, int] = {}
    for name, layer in replica.named_modules():
        if isinstance(layer, LAYERS):
            weight_name = f"{name}.weight".lstrip(".")
            layer.register_forward_hook(partial(_count, counts, weight_name))
    sample = kind_of(shape).example(1, shape)
    with torch.inference_mode():
        replica(sample)
    return counts


def active_flops(flops: Mapping[str, int], masks: Mapping[str, Tensor]) -> int:
    """Return what is left of a forward pass's operations when only active weights are multiplied."""
    active = active_counts(masks)
    total = 0.0
    for name, count in flops.items():
        share = active[name] / masks[name].numel() if name in masks else 1.0
        total += count * share
    return round(total)


def _count(counts: dict[str, int], name: str, layer: nn.Module, _: object, output: Tensor) -> None:
    weight = layer.get_parameter("weight")  # [out, …]
    uses = output.numel() // weight.shape[0]  # each weight is used at every place of the output, 1 sample
    earlier = counts.get(name, 0)  # a layer may be called more than once
    counts[name] = earlier + 2 * weight.numel() * uses
