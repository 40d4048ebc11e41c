"""Multi-layer perceptron on flattened inputs; by default the LeNet-300-100 of LeCun et al. (1998)."""

from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import nn

from . import model
from .classifier import Classifier
from .layers import Shape, Width, flat_size

Hidden = Annotated[tuple[Width, ...], Field(max_length=1000)]


@model("mlp", source="doi:10.1109/5.726791")
def mlp(shape: Shape, num_classes: int, *, hidden: Hidden = (300, 100)) -> Classifier:
    """Multi-layer perceptron with ReLU, for rows and small images."""
    sizes = [flat_size(shape), *hidden]
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layers.append(nn.Linear(before, after))
        layers.append(nn.ReLU())
    features = nn.Sequential(*layers)  # [b, …] → [b, the last hidden size]
    head = nn.Linear(sizes[-1], num_classes)
    return Classifier(features, head)


@model("lenet300-100", source="doi:10.1109/5.726791")
def lenet300_100(shape: Shape, num_classes: int) -> Classifier:
    """LeNet-300-100, hidden layers of 300 and 100 units, 0.27 M parameters on 28 × 28 pixels.

    Differs from the paper: ReLU for tanh.
    """
    return mlp(shape, num_classes, hidden=(300, 100))
