"""Masks: densities per layer, exact counts, and the weights of highest score, which a change drops or grows.

Masks name only the weights of linear and convolutional layers and of attention's projections; embeddings, biases and
norms are always dense.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from raypkg.models.operations import LAYERS

Masks = dict[str, Tensor]  # parameter name → bool tensor of the parameter's shape
Densities = dict[str, float]  # parameter name → share of active weights
Shapes = Mapping[str, torch.Size]

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention itself


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that masks apply to: the trained weights of linear and convolutional layers.

    The projections of ``nn.MultiheadAttention`` are linear, too: three in one parameter [3E, E], or each its own.
    """
    names = set()
    for layer_name, layer in model.named_modules():
        own: tuple[str, ...] = ()
        if isinstance(layer, LAYERS):
            own = ("weight",)
        elif isinstance(layer, nn.MultiheadAttention):
            own = PROJECTIONS
        names |= {f"{layer_name}.{name}".lstrip(".") for name in own}  # a model that is itself a layer has no name
    return {name: weight for name, weight in model.named_parameters() if name in names and weight.requires_grad}


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the parameters that masks apply to."""
    return {name: weight.shape for name, weight in prunable(model).items()}


def erk_densities(shapes: Shapes, density: float) -> Densities:
    """Return Erdős–Rényi-kernel densities whose weighted mean is the total density.

    d_l = ε·(n_in + n_out + k_h + k_w) / (n_in·n_out·k_h·k_w) with ε solved for the total; layers that would
    exceed 1 become dense and ε is solved again (arXiv:1911.11134).

    >>> erk_densities({"a": torch.Size([10, 10]), "b": torch.Size([2, 2])}, 0.5)["b"]
    1.0
    """
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    raw = {name: sum(shape) / sizes[name] for name, shape in shapes.items()}  # d_l at ε = 1
    densities = dict.fromkeys(shapes, 1.0)
    sparse = list(shapes)  # candidates for a density below 1
    budget = density * sum(sizes.values())
    while sparse:
        dense_weights = sum(sizes[name] for name in shapes if name not in sparse)
        weights_at_one = sum(raw[name] * sizes[name] for name in sparse)  # in these layers, at ε = 1
        epsilon = (budget - dense_weights) / weights_at_one
        below = [name for name in sparse if epsilon * raw[name] <= 1]
        if len(below) == len(sparse):
            break
        sparse = below  # the others are dense from here on: their surplus goes to these
    for name in sparse:
        densities[name] = epsilon * raw[name]
    return densities


def allot(shares: Mapping[str, float], total: int, room: Mapping[str, int]) -> dict[str, int]:
    """Return whole numbers that sum to a total, in proportion to the shares, none above its room.

    What does not fit into a full layer goes to the others; fractions are settled by the largest remainders. The shares
    are not negative; all zero counts as all equal. The total is at most the sum of the room.

    >>> allot({"a": 1.5, "b": 1.5, "c": 9.0}, 8, {"a": 9, "b": 9, "c": 3})
    {'a': 3, 'b': 2, 'c': 3}
    """
    counts = dict.fromkeys(shares, 0)
    quotas: dict[str, float] = {}
    unfilled = list(shares)
    left = total
    while unfilled:
        whole = sum(shares[name] for name in unfilled)
        equal = 1 / len(unfilled)
        quotas = {name: left * (shares[name] / whole if whole else equal) for name in unfilled}
        full = [name for name in unfilled if quotas[name] >= room[name]]
        if not full:
            break
        for name in full:
            counts[name] = room[name]
            left -= room[name]
        unfilled = [name for name in unfilled if name not in full]
    for name in unfilled:
        counts[name] = int(quotas[name])
    # Each layer lost less than 1 to rounding, so fewer than the layers are missing.
    missing = total - sum(counts.values())
    largest_first = sorted(unfilled, key=lambda name: quotas[name] - int(quotas[name]), reverse=True)
    for name in largest_first[:missing]:
        counts[name] += 1
    return counts


def random_masks(shapes: Shapes, densities: Densities, rng: torch.Generator) -> Masks:
    """Draw masks with exactly round(Σ d_l·n_l) active weights in total, but never none in a layer."""
    sizes = {name: shape.numel() for name, shape in shapes.items()}
    shares = {name: densities[name] * size for name, size in sizes.items()}
    masks = {}
    for name, count in allot(shares, round(sum(shares.values())), sizes).items():
        order = torch.randperm(sizes[name], generator=rng)
        mask = torch.zeros(sizes[name], dtype=torch.bool)
        mask[order[: max(1, count)]] = True
        masks[name] = mask.view(shapes[name])
    return masks


def largest_masks(scores: Mapping[str, Tensor], density: float) -> Masks:
    """Keep the round(density · n) largest scores of all layers together, and the largest of a layer that has none."""
    flat = torch.cat([score.flatten() for score in scores.values()])  # [n]
    count = max(1, round(density * len(flat)))
    active = torch.zeros_like(flat, dtype=torch.bool)
    active[flat.topk(count).indices] = True
    masks = {}
    parts = active.split([score.numel() for score in scores.values()])
    for (name, score), mask in zip(scores.items(), parts, strict=True):
        if not mask.any():
            mask[score.argmax()] = True  # a layer without weights would cut the network in two
        masks[name] = mask.view(score.shape)
    return masks


def enlarged(weight: Tensor, mask: Tensor) -> Tensor:
    """Return a layer's first weights as if drawn for its active inputs: w_ij·√(n/k_i) (arXiv:2010.03533).

    An initialisation draws weights of variance ∝ 1/n for n inputs. Where unit i has k_i of them, each layer shrinks the
    variance of its signal by k_i/n: through several without batch norm, at 1 % density, little of it arrives. Weight
    and mask are [out, in, …]; a unit without inputs is unchanged.
    """
    dense_inputs = mask[0].numel()  # n
    inputs = mask.flatten(1).sum(1, keepdim=True)  # k_i, [out, 1]
    factor = (dense_inputs / inputs).sqrt()
    factor = torch.where(inputs > 0, factor, 1.0)
    return (weight.flatten(1) * factor).view_as(weight)


def active_counts(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of active weights per layer."""
    return {name: int(mask.sum()) for name, mask in masks.items()}


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Return the share of weights that exist."""
    active = sum(active_counts(masks).values())
    return active / sum(mask.numel() for mask in masks.values())


# Changes during training


def drop_fraction(first: float, progress: float) -> float:
    """Return the share f = f0/2 · (1 + cos πp) of a layer's active weights to drop at the share p of training.

    >>> [drop_fraction(0.5, progress) for progress in (0.0, 0.5, 1.0)]
    [0.5, 0.25, 0.0]
    """
    wave = 1 + math.cos(math.pi * progress)  # from 2 to 0
    return first / 2 * wave


def surplus(masks: Mapping[str, Tensor], density: float) -> dict[str, int]:
    """Return each layer's active weights in excess of one density for all; every layer may keep one.

    >>> surplus({"a": torch.ones(10).bool(), "b": torch.ones(2).bool()}, 0.25)
    {'a': 7, 'b': 1}
    """
    sizes = {name: mask.numel() for name, mask in masks.items()}
    targets = allot(sizes, round(density * sum(sizes.values())), sizes)
    return {name: max(0, count - max(1, targets[name])) for name, count in active_counts(masks).items()}


def dropped(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask without its ``count`` active weights of the lowest scores [k]."""
    return mask.masked_scatter(mask, ~_highest(-scores, count))


def grown(mask: Tensor, scores: Tensor, count: int) -> Tensor:
    """Return the mask with the ``count`` inactive weights of the highest scores; those of active ones are ignored."""
    ranked = torch.where(mask, -math.inf, scores)  # faster than gathering those of inactive weights
    return mask | _highest(ranked, count, ~mask)


def zero_changed(weight: Tensor, mask: Tensor, before: Tensor, optimizer: Optimizer) -> None:
    """Zero dropped and grown weights and their optimiser state, in place.

    Adam's squared gradients of grown weights become the layer's mean: from zero, the first steps would be far too long.
    The masks are those after the change and ``before`` it.
    """
    stays = mask & before
    factor = stays.to(weight.dtype)  # faster than products with a bool mask
    weight.data.mul_(factor)
    for name, value in optimizer.state.get(weight, {}).items():
        if not isinstance(value, Tensor) or value.shape != weight.shape:
            continue  # such as Adam's count of steps
        value.mul_(factor)
        if name == "exp_avg_sq" and stays.any():
            value[mask & ~before] = value[stays].mean()


def _highest(scores: Tensor, count: int, allowed: Tensor | bool = True) -> Tensor:
    """Return True at the ``count`` highest scores; among equals, at the first. Others than the ``allowed`` are −∞.

    ``topk`` alone leaves the choice among equals to the machine, and drop rules give whole groups of weights one score.
    Counts and masks must not depend on the machine.
    """
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    limit = scores.flatten().topk(count, sorted=False).values.min()
    highest = scores > limit
    equal = (scores == limit) & allowed
    missing = count - int(highest.sum())
    if int(equal.sum()) > missing:  # rare, and slower than the rest
        equal.view(-1)[equal.flatten().nonzero()[missing:, 0]] = False
    return highest | equal
