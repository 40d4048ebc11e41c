"""LeNet-5 (LeCun et al. 1998) in today's form: ReLU, max-pool and a linear head."""

from torch import nn

from . import model
from .classifier import Classifier
from .layers import Shape, image_shape, kaiming


@model("lenet5", source="doi:10.1109/5.726791")
def lenet5(shape: Shape, num_classes: int) -> Classifier:
    """LeNet-5, two 5 × 5 convolutions with 6 and 16 channels, then 120 and 84 units.

    Differs from the paper: ReLU for tanh, max-pool for trained averages, full connections, softmax for radial units,
    and both convolutions padded, so that images down to 4 × 4 pixels fit.
    """
    channels, height, width = image_shape(shape, least=4)
    pixels = (height // 4) * (width // 4)  # that two max-pools leave
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
    head = nn.Linear(84, num_classes)
    return Classifier(features, head)
