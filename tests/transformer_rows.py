"""A small transformer on rows."""

import torch
from torch import nn

from sparse_training import C, D

PLACES, WIDTH = 4, 8
D_PLACE = D // PLACES


class Transformer(nn.Module):
    """Reads a row as a sequence of places."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(D_PLACE, WIDTH)
        self.position = nn.Embedding(PLACES, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, C)

    def features(self, x):
        tokens = x.view(-1, PLACES, D_PLACE)
        places = self.position(torch.arange(PLACES))
        return self.encoder(self.embedding(tokens) + places).mean(dim=1)

    def forward(self, x):
        return self.head(self.features(x))
