"""Every classification network of torchvision that ends in a linear layer, as ``torchvision:NAME``."""

from torch import nn

from raypkg.core.errors import UserError, unknown

from . import model
from .classifier import as_classifier
from .layers import Shape, image_shape

AUXILIARY = ("googlenet", "inception_v3")  # with these classifiers, they return more than logits while training


@model("torchvision", source="https://docs.pytorch.org/vision/stable/models.html")
def torchvision(shape: Shape, num_classes: int, *, variant: str = "", weights: str = "") -> nn.Module:
    """Network of torchvision by its name, such as torchvision:resnet18; weights=DEFAULT begins with trained ones.

    Args:
        shape: (3, H, W).
        num_classes: C.
        variant: name of the network.
        weights: name of torchvision's, such as DEFAULT or IMAGENET1K_V1, downloaded once into torch's cache; the head
            of C classes is new. Default: all drawn.

    Raises:
        UserError: unknown network or weights, or weights that cannot be downloaded.
    """
    from torchvision import models

    names = models.list_models(module=models)
    if variant not in names:
        raise unknown("torchvision model", variant, names)
    channels, _, _ = image_shape(shape, least=1)
    if channels != 3:
        raise UserError(f"input shape {shape}: the models of torchvision take 3 channels")
    if not weights:
        plain = {"aux_logits": False, "init_weights": True} if variant in AUXILIARY else {}
        return models.get_model(variant, weights=None, num_classes=num_classes, **plain)

    known = models.get_model_weights(variant)
    allowed = ["DEFAULT", *(each.name for each in known)]
    if weights not in allowed:
        raise unknown(f"weights of torchvision:{variant}", weights, allowed)
    chosen = known[weights]
    try:
        network = models.get_model(variant, weights=chosen)
    except (OSError, RuntimeError) as error:  # no network, or an interrupted download
        what = f"weights {weights} of torchvision:{variant}"
        raise UserError(f"{what} cannot be had from {chosen.url}: {error}") from None
    if hasattr(network, "AuxLogits"):  # of inception_v3, which computes it in training as long as it exists
        network.aux_logits = False
        network.AuxLogits = None
    pixels = chosen.transforms()
    split = as_classifier(network)
    split.trained_with = (tuple(pixels.mean), tuple(pixels.std))
    split.head = nn.Linear(split.head.in_features, num_classes)
    return split
