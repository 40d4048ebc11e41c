"""Multinomial logistic regression: the features are the inputs themselves."""

import math

from torch import nn

from . import model
from .classifier import Classifier


@model("linear")
def linear(shape: tuple[int, ...], num_classes: int) -> Classifier:
    """Logistic regression on flattened inputs, convex in its weights."""
    return Classifier(nn.Flatten(), nn.Linear(math.prod(shape), num_classes))
