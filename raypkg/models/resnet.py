"""Residual networks: ResNet (He et al. 2016) for small and large images, and wide ones (Zagoruyko & Komodakis 2016)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import model
from .classic import GROUPS, conv, kaiming, pooled
from .classifier import Classifier, Probability, Shape, Width, image_shape

HE = "arXiv:1512.03385"
WRN = "arXiv:1605.07146"
Connection = Callable[[int, int, int], nn.Module]  # (channels in, width, stride) → module
Norm = Literal["batch", "group", "frozen"]
EXPANSION = 4  # times its width come out of a bottleneck


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x))."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module):
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C_in, H, W] to [b, C_out, ⌈H / stride⌉, ⌈W / stride⌉]."""
        return F.relu(self.branch(x) + self.shortcut(x))


class Padded(nn.Module):
    """The option-A shortcut: every stride-th pixel, zeros in the new channels, no parameters."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.new = out - channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C_in, H, W] to [b, C_out, ⌈H / stride⌉, ⌈W / stride⌉], in the memory format of x."""
        kept = F.avg_pool2d(x, kernel_size=1, stride=self.stride)  # x[:, :, ::s, ::s] with a faster backward pass
        return F.pad(kept, (0, 0, 0, 0, 0, self.new))  # [b, C_in + new, …]


def projected(channels: int, out: int, stride: int) -> nn.Module:
    """Return the option-B shortcut, a strided 1 × 1 convolution."""
    return nn.Sequential(*conv(channels, out, 1, stride))


def basic(channels: int, width: int, stride: int) -> nn.Module:
    """Return two 3 × 3 convolutions."""
    first = conv(channels, width, 3, stride)
    second = conv(width, width, 3)
    return nn.Sequential(*first, nn.ReLU(), *second)


def bottleneck(channels: int, width: int, stride: int) -> nn.Module:
    """Return 1 × 1, 3 × 3 and 1 × 1 convolutions.

    Differs from the paper: the stride sits on the 3 × 3, as in the networks whose accuracies are quoted today.
    """
    middle = conv(width, width, 3, stride)
    before = conv(channels, width, 1)
    after = conv(width, EXPANSION * width, 1)
    return nn.Sequential(*before, nn.ReLU(), *middle, nn.ReLU(), *after)


def stages(width: int, blocks: list[int], branch: Connection, shortcut: Connection) -> tuple[nn.Module, int]:
    """Return stages of blocks, and the channels of the last; between stages the size halves, the width doubles."""
    channels = width
    layers = []
    for stage, count in enumerate(blocks):
        inner = width * 2**stage
        out = EXPANSION * inner if branch is bottleneck else inner
        for block in range(count):
            stride = 2 if stage > 0 and block == 0 else 1
            same_shape = channels == out and stride == 1
            skip = nn.Identity() if same_shape else shortcut(channels, out, stride)
            layers.append(Residual(branch(channels, inner, stride), skip))
            channels = out
    return nn.Sequential(*layers), channels


@model("resnet8", source=HE)
@model("resnet20", source=HE)
@model("resnet32", source=HE)
@model("resnet56", source=HE)
def small(shape: Shape, num_classes: int, *, registered: str, width: Width = 16, norm: Norm = "batch") -> Classifier:
    """ResNet for small images: 0.08 M parameters with 8 layers, 0.27 M with 20, 0.46 M with 32, 0.85 M with 56.

    Section 4.2: 6n + 2 layers in three stages of n blocks with w, 2w, 4w channels and option-A shortcuts.
    """
    channels, _, _ = image_shape(shape, least=4)
    blocks = (int(registered.removeprefix("resnet")) - 2) // 6
    stem = [*conv(channels, width, 3), nn.ReLU()]
    body, out = stages(width, [blocks] * 3, basic, Padded)
    return classifier([*stem, body], out, num_classes, norm)


@model("resnet18", source=HE)
@model("resnet34", source=HE)
@model("resnet50", source=HE)
def large(shape: Shape, num_classes: int, *, registered: str, width: Width = 64, norm: Norm = "batch") -> Classifier:
    """ResNet for large images: 11.2 M parameters with 18 layers, 21.3 M with 34, 25.6 M with 50 and 1,000 classes.

    Table 1: four stages with w, 2w, 4w, 8w channels (times 4 after bottlenecks) and option-B shortcuts.

    Differs from the paper: images with a side under 96 pixels meet a 3 × 3 stem of stride 1 without max-pool.
    """
    channels, *sides = image_shape(shape, least=8)
    if min(sides) < 96:
        stem = [*conv(channels, width, 3), nn.ReLU()]
    else:
        stem = [*conv(channels, width, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]
    blocks = [2, 2, 2, 2] if registered == "resnet18" else [3, 4, 6, 3]
    body, out = stages(width, blocks, bottleneck if registered == "resnet50" else basic, projected)
    return classifier([*stem, body], out, num_classes, norm)


def classifier(layers: list[nn.Module], out: int, num_classes: int, norm: Norm) -> Classifier:
    """Return a classifier of pooled layers with ``out`` channels, with He's initial weights."""
    features = pooled(layers)  # [b, out]
    kaiming(features)
    head = nn.Linear(out, num_classes)
    if norm == "batch":
        return Classifier(features, head)
    # With these norms a sample's output depends on no other sample of its batch.
    for path, layer in list(features.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            width = layer.num_features
            # group norm (arXiv:1803.08494) with 8 groups instead of 32, as small networks have few channels
            new = nn.GroupNorm(math.gcd(GROUPS, width), width) if norm == "group" else FrozenNorm(width)
            features.set_submodule(path, new)
    return Classifier(features, head) if norm == "group" else Frozen(features, head)


class FrozenNorm(nn.Module):
    """γ (x − μ) / √(σ² + ε) + β for each channel, with fixed mean μ and variance σ² of the first inputs.

    Batch norm (arXiv:1502.03167) with frozen statistics, μ = 0 and σ² = 1 before ``fitting``. They do not follow the
    weights, so training needs a lower rate: on digits ResNet-8 failed at 0.1 and reached 92.5 % at 0.03.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.fitting = False

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C, H, W] to the same shape; while ``fitting``, take the statistics from x."""
        if self.fitting:
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            self.mean.copy_(mean)
            self.variance.copy_(variance)
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias)


class Frozen(Classifier):
    """A classifier with norms fitted to training inputs at its first weights."""

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Take the statistics of each norm from inputs [n, C, H, W], normalised by the earlier norms."""
        norms = [module for module in self.modules() if isinstance(module, FrozenNorm)]
        for norm in norms:
            norm.fitting = True
        self.features(x)
        for norm in norms:
            norm.fitting = False


class WideBlock(nn.Module):
    """x + branch(relu(bn(x))); if the shape changes, the shortcut is a 1 × 1 convolution of relu(bn(x)) as well."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float):
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        self.projection = None
        if channels != out or stride != 1:
            self.projection = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C_in, H, W] to [b, C_out, ⌈H / stride⌉, ⌈W / stride⌉]."""
        active = self.activation(x)
        shortcut = x if self.projection is None else self.projection(active)
        return shortcut + self.branch(active)


@model("wrn-16-8", source=WRN)
@model("wrn-16-10", source=WRN)
@model("wrn-22-8", source=WRN)
@model("wrn-28-2", source=WRN)
@model("wrn-28-10", source=WRN)
def wide(shape: Shape, num_classes: int, *, registered: str, dropout: Probability = 0.0) -> Classifier:
    """Wide ResNet, wrn-LAYERS-K with K times the channels: 11.0 M parameters (16-8), 17.1 (16-10) to 36.5 (28-10).

    Table 1 of the paper: 6n + 4 layers in three stages of n blocks with 16k, 32k, 64k channels.
    """
    _, depth, k = registered.split("-")
    channels, _, _ = image_shape(shape, least=4)
    before = 16
    layers: list[nn.Module] = [nn.Conv2d(channels, before, 3, padding=1, bias=False)]
    for stage in range(3):
        out = 16 * int(k) * 2**stage
        for block in range((int(depth) - 4) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(WideBlock(before, out, stride, dropout))
            before = out
    layers += [nn.BatchNorm2d(before), nn.ReLU()]  # blocks begin with theirs, so the last sum has none
    features = pooled(layers)  # [b, 64k]
    kaiming(features)
    return Classifier(features, nn.Linear(before, num_classes))
