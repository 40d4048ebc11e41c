"""Logistic regression, multi-layer perceptrons and LeNet (LeCun et al. 1998) in today's form: ReLU, a linear head."""

import math
from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import nn

from . import model
from .classifier import Classifier
from .layers import Shape, Width, flat_size, image_shape, kaiming

LECUN = "doi:10.1109/5.726791"


@model("linear")
def linear(shape: Shape, num_classes: int) -> Classifier:
    """Logistic regression on flattened inputs, convex in its weights."""
    return Classifier(nn.Flatten(), nn.Linear(flat_size(shape), num_classes))


@model("mlp", source=LECUN)
def mlp(
    shape: Shape, num_classes: int, *, hidden: Annotated[tuple[Width, ...], Field(max_length=1000)] = (300, 100)
) -> Classifier:
    """Multi-layer perceptron with ReLU, for rows and small images."""
    sizes = [flat_size(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    features = nn.Sequential(*layers)  # [b, …] → [b, the last hidden size]
    return Classifier(features, nn.Linear(sizes[-1], num_classes))


@model("lenet300-100", source=LECUN)
def lenet300_100(shape: Shape, num_classes: int) -> Classifier:
    """LeNet-300-100, hidden layers of 300 and 100 units, 0.27 M parameters on 28 × 28 pixels.

    Differs from the paper: ReLU for tanh.
    """
    return mlp(shape, num_classes, hidden=(300, 100))


@model("lenet5", source=LECUN)
@model("lenet5-caffe", source="arXiv:2102.02887")
def lenet5(shape: Shape, num_classes: int, *, registered: str) -> Classifier:
    """LeNet-5, 5 × 5 kernels: 6 and 16 channels, 120 and 84 units; of Caffe and ITOP, 20 and 50 channels, 500 units.

    Differs from the paper: ReLU for tanh, max-pool for trained averages, full connections, softmax for radial units.
    Both convolutions are padded, so that images down to 4 × 4 pixels fit. Caffe's form has no padding, and 0.43 M
    parameters on 28 × 28 pixels.
    """
    first, second, units, padding = (20, 50, [500], 0) if registered == "lenet5-caffe" else (6, 16, [120, 84], 2)
    channels, *sides = image_shape(shape, least=4 if padding else 16)
    layers: list[nn.Module] = []
    for before, after in ((channels, first), (first, second)):
        layers += [nn.Conv2d(before, after, 5, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
        sides = [(side + 2 * padding - 4) // 2 for side in sides]
    layers.append(nn.Flatten())  # [b, second · pixels]
    for before, after in pairwise([second * math.prod(sides), *units]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    features = nn.Sequential(*layers)
    kaiming(features)
    return Classifier(features, nn.Linear(units[-1], num_classes))
