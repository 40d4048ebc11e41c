"""Airbench (Jordan 2024): whitened patches and six convolutions, for trainings of few epochs."""

import math

import torch
from torch import Tensor, nn

from . import model
from .classic import GROUPS, Norm
from .classifier import Classifier, Shape, Width, image_shape

JORDAN = "arXiv:2404.00498"
PATCH = 2  # pixels, of a side
RIDGE = 5e-4  # added to the variances of patches before they are divided by
RATE = 64  # of the biases after norms, as a multiple of the other weights' learning rate
MEMORY = 0.4  # share of a batch in the running statistics of batch norm: there are few batches to learn them from
TEMPERATURE = 9  # by which the features are divided


class Whitened(nn.Module):
    """Every patch times ± e_i / √(λ_i + ε), for the C·2·2 eigenvectors e_i of (1/n) Σ p pᵀ over patches (Section 3.2).

    The filters are fixed, and random before ``fit``; only a bias is trained.
    """

    filters: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        inputs = channels * PATCH**2
        drawn = nn.init.orthogonal_(torch.empty(inputs, inputs))
        self.register_buffer("filters", self._both_signs(drawn))
        self.bias = nn.Parameter(torch.zeros(2 * inputs))

    def fit(self, x: Tensor) -> None:
        """Compute the eigenvectors from the patches of images x [n, C, H, W]."""
        patches = nn.functional.unfold(x.double(), PATCH)  # [n, C·4, patches of an image]
        patches = patches.transpose(1, 2).flatten(0, 1)  # [patches, C·4]
        covariance = patches.T @ patches / len(patches)
        variances, vectors = torch.linalg.eigh(covariance)
        scaled = vectors / (variances + RIDGE).sqrt()  # a column for each
        self.filters.copy_(self._both_signs(scaled.T))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C, H, W] to [b, 8·C, H − 1, W − 1]."""
        return nn.functional.conv2d(x, self.filters.to(x.dtype), self.bias)

    def _both_signs(self, rows: Tensor) -> Tensor:
        return torch.cat([rows, -rows]).view(-1, self.channels, PATCH, PATCH)


class Shifted(nn.Module):
    """norm(x) + √κ·b: without scales, and with biases that learn κ = 64 times as fast as other weights by SGD."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        if norm == "batch":
            self.norm: nn.Module = nn.BatchNorm2d(channels, momentum=MEMORY, affine=False)
        else:
            self.norm = nn.GroupNorm(math.gcd(GROUPS, channels), channels, affine=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C, H, W] to the same shape."""
        shift = math.sqrt(RATE) * self.bias  # a step of b and its gradient are √κ times as large, each
        return self.norm(x) + shift[:, None, None]


def dirac(channels: int, out: int) -> nn.Conv2d:
    """Return a 3 × 3 convolution whose first channels are its inputs (Section 3.3)."""
    convolution = nn.Conv2d(channels, out, 3, padding=1, bias=False)
    if not convolution.weight.is_meta:
        nn.init.dirac_(convolution.weight.data[:channels])
    return convolution


class Cooled(nn.Module):
    """x / 9, so that the first logits are small."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, D] to [b, D]."""
        return x / TEMPERATURE


class Airbench(Classifier):
    """A classifier with a first layer fitted to the training inputs."""

    def prepare(self, x: Tensor) -> None:
        """Whiten the patches of normalised training images x [n, C, H, W]."""
        first = next(self.features.children())
        assert isinstance(first, Whitened)
        first.fit(x)


@model("airbench", source=JORDAN)
def airbench(shape: Shape, num_classes: int, *, width: Width = 64, norm: Norm = "batch") -> Classifier:
    """Airbench, six convolutions on whitened patches with w, 4w, 4w channels, 2.0 M parameters.

    Differs from the paper: the biases' rate is 64 times the others' by their parametrisation, so for SGD alone; the
    whitening's bias learns in all epochs; the head has a bias. The average over weights is no Lookahead:
    training never restarts from it.
    """
    channels, *sides = image_shape(shape, least=4)
    whitened = Whitened(channels)
    layers: list[nn.Module] = [whitened, nn.GELU()]
    side = min(sides) + 1 - PATCH
    before = len(whitened.bias)
    for out in (width, 4 * width, 4 * width):
        pool = 2 if side > 3 else 1  # what a 3 × 3 kernel sees is to be more than padding
        layers += [dirac(before, out), nn.MaxPool2d(pool), Shifted(out, norm), nn.GELU()]
        layers += [dirac(out, out), Shifted(out, norm), nn.GELU()]
        side //= pool
        before = out
    features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), Cooled())
    return Airbench(features, nn.Linear(before, num_classes))
