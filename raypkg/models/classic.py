"""Logistic regression, multi-layer perceptrons and LeNet (LeCun et al. 1998) in today's form: ReLU, a linear head."""

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
    shape: Shape,
    num_classes: int,
    *,
    hidden: Annotated[tuple[Width, ...], Field(max_length=1000)] = (300, 100),
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
def lenet5(shape: Shape, num_classes: int) -> Classifier:
    """LeNet-5, two 5 × 5 convolutions with 6 and 16 channels, then 120 and 84 units.

    Differs from the paper: ReLU for tanh, max-pool for trained averages, full connections, softmax for radial units,
    and both convolutions padded, so that images down to 4 × 4 pixels fit.
    """
    channels, height, width = image_shape(shape, least=4)
    pixels = (height // 4) * (width // 4)  # left by two max-pools
    features = nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),  # [b, 16 · pixels]
        nn.Linear(16 * pixels, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
    )
    kaiming(features)
    return Classifier(features, nn.Linear(84, num_classes))


@model("lenet5-caffe", source="arXiv:2102.02887")
def lenet5_caffe(shape: Shape, num_classes: int) -> Classifier:
    """LeNet-5 of Caffe and ITOP: 20 and 50 channels, 500 units, 0.43 M parameters on 28 × 28 pixels."""
    channels, height, width = image_shape(shape, least=16)
    pixels = ((height - 4) // 2 - 4) // 2 * (((width - 4) // 2 - 4) // 2)  # left by two convolutions and max-pools
    features = nn.Sequential(
        nn.Conv2d(channels, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),  # [b, 50 · pixels]
        nn.Linear(50 * pixels, 500),
        nn.ReLU(),
    )
    kaiming(features)
    return Classifier(features, nn.Linear(500, num_classes))
