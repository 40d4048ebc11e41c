"""Masks: which weights exist. Densities per layer first, then masks with exact counts.

Masks name only the weights of linear and convolutional layers and of attention's projections; embeddings, biases and
norms are always dense.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError

Masks = dict[str, Tensor]  # parameter name → bool tensor of the parameter's shape
Densities = dict[str, float]  # parameter name → share of weights kept
Shapes = Mapping[str, torch.Size]
Shares = Mapping[str, float]

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention itself


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that masks apply to: the trained weights of linear and convolutional layers.

    The projections of ``nn.MultiheadAttention`` are linear, too: three in one parameter [3E, E], or each its own.
    """
    names = set()
    for name, layer in model.named_modules():
        for weight in _weights_of(layer):
            names.add(f"{name}.{weight}".lstrip("."))  # a model that is itself such a layer has no name
    weights = {}
    for name, parameter in model.named_parameters():
        if name in names and parameter.requires_grad:
            weights[name] = parameter
    return weights


def _weights_of(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of a layer's own weights that masks apply to."""
    if isinstance(layer, LAYERS):
        return ("weight",)
    return PROJECTIONS if isinstance(layer, nn.MultiheadAttention) else ()


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the parameters that masks apply to."""
    return {name: weight.shape for name, weight in prunable(model).items()}


def erk(shapes: Shapes, density: float) -> Densities:
    """Return Erdős–Rényi-kernel densities whose weighted mean is the total density.

    d_l = ε·(n_in + n_out + k_h + k_w) / (n_in·n_out·k_h·k_w) with ε solved for the total; layers that would
    exceed 1 become dense and ε is solved again (arXiv:1911.11134).

    Raises:
        UserError: density outside (0, 1].

    >>> erk({"a": torch.Size([10, 10]), "b": torch.Size([2, 2])}, 0.5)["b"]
    1.0
    """
    if not 0 < density <= 1:
        raise UserError(f"density {density} is outside (0, 1]")
    sizes = _sizes(shapes)
    raw = {}  # d_l at ε = 1
    for name, shape in shapes.items():
        raw[name] = sum(shape) / sizes[name]
    densities = dict.fromkeys(shapes, 1.0)
    sparse = list(shapes)  # the layers that stay below 1, as far as is known
    budget = density * sum(sizes.values())
    while sparse:
        dense_weights = sum(sizes[name] for name in shapes if name not in sparse)
        weights_at_one = sum(raw[name] * sizes[name] for name in sparse)  # of these layers, at ε = 1
        epsilon = (budget - dense_weights) / weights_at_one
        below = [name for name in sparse if epsilon * raw[name] <= 1]
        if len(below) == len(sparse):
            break
        sparse = below  # the others are dense from here on: their surplus goes to these
    for name in sparse:
        densities[name] = epsilon * raw[name]
    return densities


def check_density(density: float, shapes: Shapes) -> None:
    """Refuse a density that leaves a layer without a weight.

    Raises:
        UserError: there are no weights to mask, or fewer would exist than there are layers.
    """
    if not shapes:
        raise UserError(f"density = {density:g}: the model trains no weights of linear or convolutional layers")
    weights = sum(shape.numel() for shape in shapes.values())
    active = round(density * weights)
    if active < len(shapes):
        raise UserError(
            f"density = {density:g} of {weights:,} weights leaves {active} for {len(shapes)} layers: each needs one at"
            " least"
        )


def allot(shares: Shares, total: int, room: Mapping[str, int]) -> dict[str, int]:
    """Return whole numbers that sum to a total, in proportion to the shares, none above its room.

    What does not fit into a full layer goes to the others; fractions are settled by the largest remainders.

    Args:
        shares: not negative; all zero counts as all equal.
        total: at most Σ room.
        room: by the names of the shares.

    >>> allot({"a": 1.5, "b": 1.5, "c": 9.0}, 8, {"a": 9, "b": 9, "c": 3})
    {'a': 3, 'b': 2, 'c': 3}
    """
    counts = dict.fromkeys(shares, 0)
    quotas: dict[str, float] = {}
    unfilled = list(shares)
    left = total
    while unfilled:
        quotas = _quotas(shares, unfilled, left)
        full = [name for name in unfilled if quotas[name] >= room[name]]
        if not full:
            break
        for name in full:
            counts[name] = room[name]
            left -= room[name]
        unfilled = [name for name in unfilled if name not in full]
    for name in unfilled:
        counts[name] = int(quotas[name])

    def remainder(name: str) -> float:
        return quotas[name] - int(quotas[name])

    missing = total - sum(counts.values())  # fewer than the layers: each lost less than 1 to rounding
    largest_first = sorted(unfilled, key=remainder, reverse=True)
    for name in largest_first[:missing]:
        counts[name] += 1
    return counts


def counts_of(shapes: Shapes, densities: Densities) -> dict[str, int]:
    """Return how many weights of each layer to keep: exactly round(Σ d_l·n_l) in all, but never none of a layer."""
    sizes = _sizes(shapes)
    shares = {}
    for name, size in sizes.items():
        shares[name] = densities[name] * size
    total = round(sum(shares.values()))
    counts = allot(shares, total, sizes)
    return {name: max(1, count) for name, count in counts.items()}


def random_masks(shapes: Shapes, densities: Densities, rng: torch.Generator) -> Masks:
    """Draw masks with the counts of the densities."""
    masks = {}
    for name, keep in counts_of(shapes, densities).items():
        size = shapes[name].numel()
        order = torch.randperm(size, generator=rng)
        mask = torch.zeros(size, dtype=torch.bool)
        mask[order[:keep]] = True
        masks[name] = mask.view(shapes[name])
    return masks


def largest_masks(scores: Mapping[str, Tensor], density: float) -> Masks:
    """Keep the round(density · n) largest scores of all layers together, and the largest of a layer that has none."""
    flat = torch.cat([score.flatten() for score in scores.values()])  # [n]
    keep = max(1, round(density * len(flat)))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(keep).indices] = True
    masks = {}
    start = 0
    for name, score in scores.items():
        end = start + score.numel()
        mask = kept[start:end]
        if not mask.any():
            mask[score.argmax()] = True  # a layer without weights would cut the network in two
        masks[name] = mask.view(score.shape)
        start = end
    return masks


def enlarged(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a layer's first weights as if drawn for the inputs that exist: w_ij·√(n/k_i) (arXiv:2010.03533).

    An initialisation takes weights of variance ∝ 1/n for n inputs. Where unit i has k_i of them, the variance of its
    signal shrinks by k_i/n in each layer: through several without batch norm, at 1 % density, little of it arrives.

    Args:
        weight: [out, in, …].
        mask: like the weight; a unit without inputs stays as it is.

    >>> enlarged(torch.ones(2, 4), torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool())
    tensor([[2., 2., 2., 2.],
            [1., 1., 1., 1.]])
    """
    dense_inputs = mask[0].numel()  # n
    inputs = mask.flatten(1).sum(1, keepdim=True)  # k_i, [out, 1]
    factor = (dense_inputs / inputs).sqrt()
    factor = torch.where(inputs > 0, factor, 1.0)
    return (weight.flatten(1) * factor).view_as(weight)


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Return the share of weights that exist."""
    active = sum(active_counts(masks).values())
    return active / sum(mask.numel() for mask in masks.values())


def active_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many weights of each layer exist."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: shape.numel() for name, shape in shapes.items()}


def _quotas(shares: Shares, names: Sequence[str], total: int) -> dict[str, float]:
    """Return what each name gets of a total, as fractions."""
    whole = sum(shares[name] for name in names)
    if not whole:
        return dict.fromkeys(names, total * (1 / len(names)))
    quotas = {}
    for name in names:
        quotas[name] = total * (shares[name] / whole)
    return quotas
