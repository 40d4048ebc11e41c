"""Multinomial logistic regression: the features are the inputs themselves."""

from torch import nn

from . import model
from .classifier import Classifier
from .layers import Shape, flat_size


@model("linear")
def linear(shape: Shape, num_classes: int) -> Classifier:
    """Logistic regression on flattened inputs, convex in its weights."""
    head = nn.Linear(flat_size(shape), num_classes)
    return Classifier(nn.Flatten(), head)
