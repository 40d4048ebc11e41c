"""Masks: which weights exist. Densities per layer first, then masks with exact counts.

Masks name only the weights of linear and convolutional layers; biases and norms are always dense.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raypkg.core.errors import UserError

Masks = dict[str, Tensor]  # parameter name → bool tensor of the parameter's shape
Densities = dict[str, float]  # parameter name → share of weights kept


LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that masks apply to: the weights of linear and convolutional layers that are trained."""
    names = {f"{name}.weight".lstrip(".") for name, layer in model.named_modules() if isinstance(layer, LAYERS)}
    return {name: weight for name, weight in model.named_parameters() if name in names and weight.requires_grad}


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of the parameters that masks apply to."""
    return {name: weight.shape for name, weight in prunable(model).items()}


def erk(shapes: Mapping[str, torch.Size], density: float) -> Densities:
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
    size = {name: shape.numel() for name, shape in shapes.items()}
    raw = {name: sum(shape) / shape.numel() for name, shape in shapes.items()}
    dense: set[str] = set()
    while len(dense) < len(shapes):
        kept = density * sum(size.values()) - sum(size[name] for name in dense)
        epsilon = kept / sum(raw[name] * size[name] for name in shapes if name not in dense)
        over = {name for name in shapes if name not in dense and epsilon * raw[name] > 1}
        if not over:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        dense |= over
    return dict.fromkeys(shapes, 1.0)


def allot(shares: Mapping[str, float], total: int, room: Mapping[str, int]) -> dict[str, int]:
    """Return whole numbers that sum to a total, in proportion to the shares, none above its room.

    What does not fit into a full layer goes to the others; fractions are settled by the largest remainders.

    Args:
        shares: not negative; all zero counts as all equal.
        total: at most Σ room.
        room: by the names of the shares.

    >>> allot({"a": 1.5, "b": 1.5, "c": 9.0}, 8, {"a": 9, "b": 9, "c": 3})
    {'a': 3, 'b': 2, 'c': 3}
    """
    parts, left, open_ = dict.fromkeys(shares, 0), total, list(shares)
    quotas: dict[str, float] = {}
    while open_:
        whole = sum(shares[name] for name in open_)
        quotas = {name: left * (shares[name] / whole if whole else 1 / len(open_)) for name in open_}
        full = [name for name in open_ if quotas[name] >= room[name]]
        if not full:
            break
        parts |= {name: room[name] for name in full}
        left -= sum(room[name] for name in full)
        open_ = [name for name in open_ if name not in full]
    parts |= {name: int(quotas[name]) for name in open_}
    remainders = sorted(open_, key=lambda name: int(quotas[name]) - quotas[name])
    for name in remainders[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


def counts_of(shapes: Mapping[str, torch.Size], densities: Densities) -> dict[str, int]:
    """Return how many weights of each layer to keep: exactly round(Σ d_l·n_l) in all, but never none of a layer."""
    size = {name: shape.numel() for name, shape in shapes.items()}
    shares = {name: densities[name] * size[name] for name in shapes}
    return {name: max(1, count) for name, count in allot(shares, round(sum(shares.values())), size).items()}


def random_masks(shapes: Mapping[str, torch.Size], densities: Densities, rng: torch.Generator) -> Masks:
    """Draw masks with the counts of the densities."""
    masks = {}
    for name, keep in counts_of(shapes, densities).items():
        mask = torch.zeros(shapes[name].numel(), dtype=torch.bool)
        mask[torch.randperm(len(mask), generator=rng)[:keep]] = True
        masks[name] = mask.view(shapes[name])
    return masks


def largest_masks(scores: Mapping[str, Tensor], density: float) -> Masks:
    """Keep the round(density · n) largest scores of all layers together, and the largest of a layer that has none."""
    everything = torch.cat([score.flatten() for score in scores.values()])
    kept = torch.zeros(len(everything), dtype=torch.bool, device=everything.device)
    kept[everything.topk(max(1, round(density * len(everything)))).indices] = True
    parts = kept.split([score.numel() for score in scores.values()])
    masks = {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}
    for name, mask in masks.items():
        if not mask.any():
            mask.view(-1)[scores[name].argmax()] = True
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
    inputs = mask.flatten(1).sum(1, keepdim=True)
    factor = torch.where(inputs > 0, (mask[0].numel() / inputs).sqrt(), 1.0)
    return (weight.flatten(1) * factor).view_as(weight)


def density_of(masks: Mapping[str, Tensor]) -> float:
    """Return the share of weights that exist."""
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
