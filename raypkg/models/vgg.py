"""VGG (Simonyan & Zisserman 2015) for small images, as pruning papers train it (Lee et al. 2019, SNIP): batch norm."""

from torch import nn

from . import model
from .alexnet import SNIP
from .classifier import Classifier
from .layers import Probability, Shape, conv, fitting, hidden_layer, image_shape, kaiming, pooled

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, convolutions), each ends in a max-pool
UNITS = 512  # of a hidden layer


def vgg(shape: Shape, num_classes: int, *, third: int, hidden: int, dropout: float) -> Classifier:
    """Stages of 3 × 3 convolutions, whose third has its own kernel size, and hidden layers of 512 units.

    Differs from the paper: no biases before batch norms, max-pools dropped where images under 17 pixels run out of
    them, and the pixels that larger images leave are averaged; they are not halved by the first convolution.
    """
    before, *sides = image_shape(shape, least=4)
    strides = fitting(min(sides), [2] * len(STAGES))
    layers: list[nn.Module] = []
    for (out, count), stride in zip(STAGES, strides, strict=True):
        for number in range(count):
            kernel = third if number == 2 else 3
            layers += conv(before, out, kernel)
            layers.append(nn.ReLU())
            before = out
        layers.append(nn.MaxPool2d(stride, ceil_mode=True))
    features = pooled(layers)  # [b, 512]
    for _ in range(hidden):
        features.extend(hidden_layer(UNITS, UNITS, dropout))
    kaiming(features)
    head = nn.Linear(UNITS, num_classes)
    return Classifier(features, head)


@model("vgg-c", source=SNIP)
def vgg_c(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """VGG-C, 16 layers with 1 × 1 convolutions ending stages 3 to 5, 10.5 M parameters."""
    return vgg(shape, num_classes, third=1, hidden=2, dropout=dropout)


@model("vgg-d", source=SNIP)
def vgg_d(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """VGG-D, 16 layers with 3 × 3 convolutions throughout, 15.2 M parameters."""
    return vgg(shape, num_classes, third=3, hidden=2, dropout=dropout)


@model("vgg-like", source=SNIP)
def vgg_like(shape: Shape, num_classes: int, *, dropout: Probability = 0.0) -> Classifier:
    """VGG-like, VGG-D with one hidden layer in place of two (Zagoruyko 2015), 15.0 M parameters.

    Differs from Zagoruyko's: no dropout between convolutions, and after the hidden layer only on request, where he
    takes 0.5; the paper has none at all.
    """
    return vgg(shape, num_classes, third=3, hidden=1, dropout=dropout)
