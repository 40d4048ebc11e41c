"""VGG and AlexNet for small images, as pruning papers train them (Lee et al. 2019, SNIP): with batch norm."""

from torch import nn

from . import model
from .classifier import Classifier
from .layers import Probability, Shape, conv, image_shape, kaiming, pooled

SNIP = "arXiv:1810.02340"
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG's (channels, convolutions), each ends in a max-pool
UNITS = 512  # of VGG's hidden layers
CONVOLUTIONS = ((96, 11), (256, 5), (384, 3), (384, 3), (256, 3))  # AlexNet's (channels, kernel)


def fitting(side: int, strides: list[int]) -> list[int]:
    """Return the strides, with 1 for each that would leave a single pixel before the last one does.

    >>> fitting(32, [2, 2, 2, 2, 2]), fitting(8, [2, 2, 2, 2, 2])
    ([2, 2, 2, 2, 2], [2, 2, 1, 1, 2])
    """
    *early, last = strides
    fit = []
    for stride in early:
        fits = stride if side > stride else 1
        side = -(-side // fits)  # ⌈side / stride⌉
        fit.append(fits)
    return [*fit, last]


def hidden_layer(units: int, out: int, dropout: float) -> list[nn.Module]:
    """Return a fully connected layer: its norm takes the place of the bias and, by default, of dropout."""
    return [nn.Linear(units, out, bias=False), nn.BatchNorm1d(out), nn.ReLU(), nn.Dropout(dropout)]


@model("vgg-c", source=SNIP)
@model("vgg-d", source=SNIP)
@model("vgg-like", source=SNIP)
def vgg(shape: Shape, num_classes: int, *, registered: str, dropout: Probability = 0.0) -> Classifier:
    """VGG with 16 layers: 10.5 M parameters in C (1 × 1 kernels end stages 3 to 5), 15.2 M in D, 15.0 M in like.

    VGG-like (Zagoruyko 2015) is VGG-D with one hidden layer of 512 units in place of two.

    Differs from the paper: no biases before batch norms; max-pools omitted if images under 17 pixels run out of them;
    the pixels that larger images leave are averaged, where the paper's first convolution halves them. Differs from
    Zagoruyko's: no dropout between convolutions, and after the hidden layer only on request, where he takes 0.5; the
    paper has none at all.
    """
    before, *sides = image_shape(shape, least=4)
    strides = fitting(min(sides), [2] * len(STAGES))
    layers: list[nn.Module] = []
    for (out, count), stride in zip(STAGES, strides, strict=True):
        for number in range(count):
            kernel = 1 if registered == "vgg-c" and number == 2 else 3
            layers += [*conv(before, out, kernel), nn.ReLU()]
            before = out
        layers.append(nn.MaxPool2d(stride, ceil_mode=True))
    features = pooled(layers)  # [b, 512]
    for _ in range(1 if registered == "vgg-like" else 2):
        features.extend(hidden_layer(UNITS, UNITS, dropout))
    kaiming(features)
    return Classifier(features, nn.Linear(UNITS, num_classes))


@model("alexnet-s", source=SNIP)
@model("alexnet-b", source=SNIP)
def alexnet(shape: Shape, num_classes: int, *, registered: str, dropout: Probability = 0.0) -> Classifier:
    """AlexNet with two hidden layers of 1,024 units (s, 5.1 M parameters) or 2,048 (b, 8.5 M).

    Each of the five convolutions has stride 2, the first 4 from 64 pixels on.

    Differs from the paper: no biases before batch norms, strides omitted if images under 17 pixels run out of them,
    and the pixels that larger images leave are averaged.
    """
    before, *sides = image_shape(shape, least=4)
    side = min(sides)
    first = 4 if side >= 64 else 2
    strides = fitting(side, [first, 2, 2, 2, 2])
    layers: list[nn.Module] = []
    for (out, kernel), stride in zip(CONVOLUTIONS, strides, strict=True):
        layers += [*conv(before, out, kernel, stride), nn.ReLU()]
        before = out
    units = 1024 if registered == "alexnet-s" else 2048
    features = pooled(layers)  # [b, 256]
    features.extend(hidden_layer(before, units, dropout))
    features.extend(hidden_layer(units, units, dropout))  # [b, units]
    kaiming(features)
    return Classifier(features, nn.Linear(units, num_classes))
