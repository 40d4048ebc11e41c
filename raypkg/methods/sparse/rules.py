"""Rules of sparse training: the first masks, which weights go, which come, and in which layers.

    @initial(name)         masks(model, density, *, rng, batch) → Masks
    @drop(name)            score(weight) → scores of a layer's active weights [k]; the lowest go
    @growth(name)          score(weight, *, gradient, momentum, rng) → scores of a layer; the highest inactive ones come
    @redistribution(name)  share(weight, *, momentum) → share of a layer in the growth, from its active weights [k]

A rule omits the keywords that it does not need, and they are not computed. ``gradient`` is that of the step's batch as
if the layer were dense, ``momentum`` its running sum, m ← βm + g. `SparseTraining` (training.py) calls the rules;
masks.py keeps the counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from raypkg.models.classifier import in_mode

from . import drop, growth, initial, redistribution
from .masks import Masks, erk_densities, largest_masks, prunable, random_masks, shapes_of

# First masks


@initial("erk", source="arXiv:1911.11134")
def erk(model: nn.Module, density: float, *, rng: torch.Generator) -> Masks:
    """Draw masks that are denser where a layer is smaller."""
    shapes = shapes_of(model)
    return random_masks(shapes, erk_densities(shapes, density), rng)


@initial("uniform")
def uniform(model: nn.Module, density: float, *, rng: torch.Generator) -> Masks:
    """Draw masks of the same density in every layer, the first and the last included."""
    shapes = shapes_of(model)
    return random_masks(shapes, dict.fromkeys(shapes, density), rng)


@initial("snip", source="arXiv:1810.02340")
def snip(model: nn.Module, density: float, *, batch: tuple[Tensor, Tensor]) -> Masks:
    """Keep the largest |g ⊙ w| of all layers together, g the gradient of the batch's mean loss at the first weights."""
    x, y = batch
    weights = prunable(model)
    with in_mode(model, training=True):
        gradients = _gradients(F.cross_entropy(model(x), y), weights)
    return largest_masks({name: (gradients[name] * w).detach().abs() for name, w in weights.items()}, density)


@initial("grasp", source="arXiv:2002.07376")
def grasp(model: nn.Module, density: float, *, batch: tuple[Tensor, Tensor]) -> Masks:
    """Keep the largest w ⊙ Hg of all layers together: without such a weight, ‖g‖² decreases most, to first order.

    Differs from the paper: the loss has no temperature, and one batch serves for g and for H.
    """
    x, y = batch
    weights = prunable(model)
    # PyTorch cannot differentiate its fused forms of attention twice: use plain products.
    with in_mode(model, training=True), sdpa_kernel(SDPBackend.MATH):
        gradients = _gradients(F.cross_entropy(model(x), y), weights, create_graph=True)
        # H is never formed: the gradient of gᵀ·(g as a constant) is Hg.
        flow = torch.stack([(gradient * gradient.detach()).sum() for gradient in gradients.values()]).sum()
        products = _gradients(flow, weights)  # Hg
    return largest_masks({name: (w * products[name]).detach() for name, w in weights.items()}, density)


@initial("dense", source="arXiv:1710.01878")
def dense(model: nn.Module, density: float) -> Masks:
    """Keep all weights; the density is where gradual pruning ends."""
    return {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes_of(model).items()}


def _gradients(output: Tensor, weights: dict[str, nn.Parameter], *, create_graph: bool = False) -> dict[str, Tensor]:
    """Return the gradients of a scalar; zeros for layers that the forward pass does not use."""
    parameters = list(weights.values())
    gradients = torch.autograd.grad(
        output, parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return dict(zip(weights, gradients, strict=True))


# Weights that go


@drop("magnitude")
def smallest(weight: Tensor) -> Tensor:
    """Drop the smallest |w|."""
    return weight.abs()


@drop("set", source="arXiv:1707.04780")
def nearest_to_zero(weight: Tensor) -> Tensor:
    """Drop the same share of the smallest positive and of the largest negative weights.

    >>> nearest_to_zero(torch.tensor([1.0, -9.0, 2.0, 3.0, -8.0, 4.0])).tolist()
    [0.25, 1.0, 0.5, 0.75, 0.5, 1.0]
    """
    ranks = torch.empty_like(weight)
    for side in (weight > 0, weight <= 0):
        size = weight[side].abs()  # [s]
        order = size.argsort(stable=True)  # nearest to zero first
        rank = torch.arange(1, len(order) + 1).to(weight)
        ranked = torch.empty_like(size)
        ranked[order] = rank / len(order)  # the same share of each side is below a score
        ranks[side] = ranked
    return ranks


# Weights that come


@growth("random", source="arXiv:1707.04780")
def anywhere(weight: Tensor, *, rng: torch.Generator) -> Tensor:
    """Grow inactive weights at random."""
    return torch.rand(weight.shape, generator=rng)


@growth("gradient", source="arXiv:1911.11134")
def steepest(weight: Tensor, *, gradient: Tensor) -> Tensor:
    """Grow the largest |g|, g the gradient of the step's batch as if the layer were dense."""
    return gradient.abs()


@growth("momentum", source="arXiv:1907.04840")
def steepest_on_average(weight: Tensor, *, momentum: Tensor) -> Tensor:
    """Grow the largest |m|, m the momentum of the dense gradient."""
    return momentum.abs()


# Layers that grow


@redistribution("momentum", source="arXiv:1907.04840")
def mean_momentum(weight: Tensor, *, momentum: Tensor) -> float:
    """Grow in proportion to the mean |m| of a layer's active weights."""
    return momentum.abs().mean().item()
