"""AlexNet for small images, as pruning papers train it (Lee et al. 2019, SNIP): strides for max-pools, batch norm."""

from torch import nn

from . import model
from .classifier import Classifier, image_shape, kaiming
from .resnet import conv
from .wideresnet import Probability

SNIP = "arXiv:1810.02340"
Shape = tuple[int, ...]


def fitting(side: int, strides: list[int]) -> list[int]:
    """Return the strides, 1 for each that would leave a single pixel before the last one does.

    >>> fitting(32, [2, 2, 2, 2, 2]), fitting(8, [2, 2, 2, 2, 2])
    ([2, 2, 2, 2, 2], [2, 2, 1, 1, 2])
    """
    fit = []
    for stride in strides[:-1]:
        fit.append(stride if side > stride else 1)
        side = -(-side // fit[-1])  # ⌈side / stride⌉
    return [*fit, strides[-1]]


def dense(units: int, out: int, dropout: float) -> list[nn.Module]:
    """Return a fully connected hidden layer: its norm takes the place of the bias and, by default, of dropout."""
    return [nn.Linear(units, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(), nn.Dropout(dropout)]


def alexnet(shape: Shape, num_classes: int, k: int, dropout: float) -> Classifier:
    """Five convolutions, each of stride 2 (the first of 4 from 64 pixels on), and two hidden layers of 1,024k units.

    Differs from the paper: no biases before batch norms, strides dropped where images under 17 pixels run out of them,
    and the pixels that larger images leave are averaged.
    """
    before, *sides = image_shape(shape, least=4)
    side = min(sides)
    layers: list[nn.Module] = []
    strides = fitting(side, [4 if side >= 64 else 2, 2, 2, 2, 2])
    for out, kernel, stride in zip([96, 256, 384, 384, 256], [11, 5, 3, 3, 3], strides, strict=True):
        layers += [*conv(before, out, kernel, stride), nn.ReLU()]
        before = out
    hidden = [*dense(before, 1024 * k, dropout), *dense(1024 * k, 1024 * k, dropout)]
    features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *hidden)  # [b, C, H, W] → [b, 1024k]
    kaiming(features)
    return Classifier(features, nn.Linear(1024 * k, num_classes))


@model("alexnet-s", source=SNIP)
def alexnet_s(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """AlexNet with hidden layers of 1,024 units, 5.1 M parameters."""
    return alexnet(shape, num_classes, 1, dropout)


@model("alexnet-b", source=SNIP)
def alexnet_b(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """AlexNet with hidden layers of 2,048 units, 8.5 M parameters."""
    return alexnet(shape, num_classes, 2, dropout)
