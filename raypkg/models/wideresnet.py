"""Wide residual networks (Zagoruyko & Komodakis 2016): few layers, k times the channels, batch norm first."""

from torch import Tensor, nn

from . import model
from .classifier import Classifier
from .layers import Probability, Shape, image_shape, kaiming, pooled

WRN = "arXiv:1605.07146"


class WideBlock(nn.Module):
    """x + branch(relu(bn(x))); if the shape changes, the shortcut is a 1 × 1 convolution of relu(bn(x)) as well."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float):
        super().__init__()
        self.activation = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        self.projection = None
        if channels != out or stride != 1:
            self.projection = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, C_in, H, W] to [b, C_out, ⌈H / stride⌉, ⌈W / stride⌉]."""
        active = self.activation(x)
        shortcut = x if self.projection is None else self.projection(active)
        return shortcut + self.branch(active)


@model("wrn-16-8", source=WRN)
@model("wrn-16-10", source=WRN)
@model("wrn-22-8", source=WRN)
@model("wrn-28-2", source=WRN)
@model("wrn-28-10", source=WRN)
def wide(shape: Shape, num_classes: int, *, registered: str, dropout: Probability = 0.0) -> Classifier:
    """Wide ResNet, wrn-LAYERS-K with K times the channels: 11.0 M parameters (16-8), 17.1 (16-10) to 36.5 (28-10).

    Table 1 of the paper: 6n + 4 layers in three stages of n blocks with 16k, 32k, 64k channels.
    """
    _, depth, k = registered.split("-")
    channels, _, _ = image_shape(shape, least=4)
    before = 16
    layers: list[nn.Module] = [nn.Conv2d(channels, before, 3, padding=1, bias=False)]
    for stage in range(3):
        out = 16 * int(k) * 2**stage
        for block in range((int(depth) - 4) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(WideBlock(before, out, stride, dropout))
            before = out
    layers += [nn.BatchNorm2d(before), nn.ReLU()]  # blocks begin with theirs, so the last sum has none
    features = pooled(layers)  # [b, 64k]
    kaiming(features)
    return Classifier(features, nn.Linear(before, num_classes))
