"""Transformer encoder for texts, small enough to be trained from scratch."""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from . import model
from .classifier import Classifier, Probability, Shape, Width, text_shape

SEGMENTS = 2


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
