"""AlexNet for small images, as pruning papers train it (Lee et al. 2019, SNIP): strides for max-pools, batch norm."""

from torch import nn

from . import model
from .classifier import Classifier
from .layers import Probability, Shape, conv, fitting, hidden_layer, image_shape, kaiming, pooled

SNIP = "arXiv:1810.02340"
CHANNELS = (96, 256, 384, 384, 256)  # of the convolutions
KERNELS = (11, 5, 3, 3, 3)


def alexnet(shape: Shape, num_classes: int, units: int, dropout: float) -> Classifier:
    """Five convolutions, each of stride 2 (the first of 4 from 64 pixels on), and two hidden layers.

    Differs from the paper: no biases before batch norms, strides dropped where images under 17 pixels run out of them,
    and the pixels that larger images leave are averaged.
    """
    before, *sides = image_shape(shape, least=4)
    side = min(sides)
    first = 4 if side >= 64 else 2
    strides = fitting(side, [first, 2, 2, 2, 2])
    layers: list[nn.Module] = []
    for out, kernel, stride in zip(CHANNELS, KERNELS, strides, strict=True):
        layers += conv(before, out, kernel, stride)
        layers.append(nn.ReLU())
        before = out
    features = pooled(layers)  # [b, 256]
    features.extend(hidden_layer(before, units, dropout))
    features.extend(hidden_layer(units, units, dropout))  # [b, units]
    kaiming(features)
    head = nn.Linear(units, num_classes)
    return Classifier(features, head)


@model("alexnet-s", source=SNIP)
def alexnet_s(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """AlexNet with hidden layers of 1,024 units, 5.1 M parameters."""
    return alexnet(shape, num_classes, units=1024, dropout=dropout)


@model("alexnet-b", source=SNIP)
def alexnet_b(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """AlexNet with hidden layers of 2,048 units, 8.5 M parameters."""
    return alexnet(shape, num_classes, units=2048, dropout=dropout)
