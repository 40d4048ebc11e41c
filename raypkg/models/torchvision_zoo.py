"""Every classification network of torchvision that ends in a linear layer, as ``torchvision:NAME``, untrained."""

from typing import Any

from torch import nn

from raypkg.core.errors import UserError, unknown

from . import model
from .layers import Shape, image_shape

# With their auxiliary classifiers these two return more than logits while training.
PLAIN: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


@model("torchvision", source="https://docs.pytorch.org/vision/stable/models.html")
def torchvision(shape: Shape, num_classes: int, *, variant: str = "") -> nn.Module:
    """Network of torchvision by its name, such as torchvision:resnet18, with random weights."""
    from torchvision import models

    names = models.list_models(module=models)
    if variant not in names:
        raise unknown("torchvision model", variant, names)
    channels, _, _ = image_shape(shape, least=1)
    if channels != 3:
        raise UserError(f"input shape {shape}: the models of torchvision take 3 channels")
    options = PLAIN.get(variant, {})
    return models.get_model(variant, weights=None, num_classes=num_classes, **options)
