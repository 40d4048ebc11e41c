"""Plain networks: logistic regression, perceptrons, LeNet, AlexNet and VGG, and a transformer for texts.

LeNet (LeCun et al. 1998) is in today's form: ReLU, a linear head. AlexNet and VGG for small images are those that
pruning papers train (Lee et al. 2019, SNIP): with batch norm.
"""

import math
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from . import model
from .classifier import Classifier, Probability, Shape, Width, flat_size, image_shape, text_shape

LECUN = "doi:10.1109/5.726791"
SNIP = "arXiv:1810.02340"
STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG's (channels, convolutions), each ends in a max-pool
UNITS = 512  # of VGG's hidden layers
CONVOLUTIONS = ((96, 11), (256, 5), (384, 3), (384, 3), (256, 3))  # AlexNet's (channels, kernel)
SEGMENTS = 2  # of texts
Norm = Literal["batch", "group"]
GROUPS = 8  # of group norm, where the channels allow it


def conv(channels: int, out: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution that keeps the size at stride 1, and its batch norm, which has the bias."""
    convolution = nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(out)]


def pooled(layers: list[nn.Module]) -> nn.Sequential:
    """Return layers on images followed by the mean of each channel of the last one: [b, C, H, W] → [b, D]."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def kaiming(module: nn.Module) -> None:
    """Draw every convolution's weights from N(0, 2 / fan_out) (He et al., arXiv:1502.01852, equation 14).

    Weights on the meta device, as while a model's size is checked, are skipped: PyTorch would import its compiler.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and not layer.weight.is_meta:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


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


@model("transformer", source="arXiv:1706.03762")
def transformer(
    shape: Shape,
    num_classes: int,
    *,
    layers: Annotated[int, Field(ge=1, le=1000)] = 2,
    width: Width = 128,
    heads: Width = 4,
    dropout: Probability = 0.1,
) -> Classifier:
    """Transformer encoder for texts: 2 layers of width 128, its features the mean over the tokens.

    Differs from the paper: an encoder alone, with learned positions, GELU, and norms before each part (pre-norm).
    """
    length, vocabulary = text_shape(shape)
    blocks = [EncoderLayer(width, heads, dropout) for _ in range(layers)]
    return Classifier(Encoder(length, vocabulary, width, blocks, dropout), nn.Linear(width, num_classes))


class Encoder(nn.Module):
    """Texts of at most ``length`` tokens, int64 [b, 2, l] → features [b, D]."""

    def __init__(self, length: int, vocabulary: int, width: int, blocks: list["EncoderLayer"], dropout: float):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.segments = nn.Embedding(SEGMENTS, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        for table in (self.tokens, self.positions, self.segments):
            if not table.weight.is_meta:  # it has no numbers while its size is checked
                nn.init.normal_(table.weight, std=1 / math.sqrt(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over each text's tokens."""
        tokens, segments = x.clamp_min(0).unbind(1)  # [b, l]; the embedding of padding has no effect
        there = x[:, 0] >= 0  # [b, l]
        position = torch.arange(x.shape[2], device=x.device)
        embedded = self.tokens(tokens) + self.segments(segments) + self.positions(position)
        h = self.dropout(embedded)  # [b, l, D]
        for block in self.blocks:
            h = block(h, there)
        h = self.norm(h)
        weight = there[:, :, None].to(h.dtype)  # [b, l, 1]
        return (h * weight).sum(1) / weight.sum(1).clamp_min(1)


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each added to its input: [b, l, D] → [b, l, D]."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(dropout),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, there: Tensor) -> Tensor:
        """Return the next layer's input; nothing attends to padding, which ``there`` [b, l] excludes."""
        normed = self.norm(h)
        # softmax(QKᵀ/√d) V of every head, joined [b, l, D]
        projections = (self.query, self.key, self.value)
        query, key, value = (
            layer(normed).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [b, heads, l, d]
            for layer in projections
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None])
        h = h + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return h + self.mlp(h)
