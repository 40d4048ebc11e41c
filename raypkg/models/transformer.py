"""Transformer encoder for texts, small enough to be trained from scratch."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from raypkg.core.errors import UserError

from . import model
from .classifier import Classifier
from .layers import Probability, Shape, Width, text_shape

Layers = Annotated[int, Field(ge=1, le=1000)]
SEGMENTS = 2


@model("transformer", source="arXiv:1706.03762")
def transformer(
    shape: Shape,
    num_classes: int,
    *,
    layers: Layers = 2,
    width: Width = 128,
    heads: Width = 4,
    dropout: Probability = 0.1,
) -> Classifier:
    """Transformer encoder for texts: 2 layers of width 128, its features the mean over the tokens.

    Differs from the paper: an encoder alone, with learned positions, GELU, and norms before each part (pre-norm).
    """
    length, vocabulary = text_shape(shape)
    if width % heads:
        raise UserError(f"width = {width} cannot be shared by heads = {heads}: it must be a multiple of them")
    blocks = [EncoderLayer(width, heads, dropout) for _ in range(layers)]
    return Classifier(Encoder(length, vocabulary, width, blocks, dropout), nn.Linear(width, num_classes))


class Encoder(nn.Module):
    """Texts int64 [b, 2, l] → features [b, D].

    Args:
        length: the most tokens of a text.
        vocabulary: tokens that there are.
        width: D.
        blocks: applied one after another.
        dropout: share of the embedding's numbers that are dropped.
    """

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
        tokens, segments = x.clamp_min(0).unbind(1)  # [b, l]; what padding is embedded as, nobody sees
        there = x[:, 0] >= 0  # [b, l]
        position = torch.arange(x.shape[2], device=x.device)
        embedded = self.tokens(tokens) + self.segments(segments) + self.positions(position)
        h = self.dropout(embedded)  # [b, l, D]
        for block in self.blocks:
            h = block(h, there)
        return mean_of(self.norm(h), there)


class EncoderLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each added to what it is given: [b, l, D] → [b, l, D]."""

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
        """Return the next layer's input.

        Args:
            h: [b, l, D].
            there: which positions are tokens and no padding, [b, l].
        """
        h = h + self.dropout(self._attended(self.norm(h), there))
        return h + self.mlp(h)

    def _attended(self, h: Tensor, there: Tensor) -> Tensor:
        """Return softmax(QKᵀ/√d) V of every head, joined, [b, l, D]; nothing attends to padding."""
        query = self._by_head(self.query(h))
        key = self._by_head(self.key(h))
        value = self._by_head(self.value(h))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=there[:, None, None])
        return self.out(attended.transpose(1, 2).flatten(2))

    def _by_head(self, h: Tensor) -> Tensor:
        return h.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [b, heads, l, d]


def mean_of(h: Tensor, there: Tensor) -> Tensor:
    """Return the mean over the positions that are tokens, [b, D]."""
    weight = there[:, :, None].to(h.dtype)  # [b, l, 1]
    return (h * weight).sum(1) / weight.sum(1).clamp_min(1)
