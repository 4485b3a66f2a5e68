"""A small encoder in plain PyTorch: LayerNorm, learned positions, attention without a mask, GELU, biases everywhere."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TinyEncoder(nn.Module):
    """patches [B, T, features] → logits [B, classes], as a vision transformer's; T up to `length`."""

    def __init__(
        self,
        features: int = 48,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 4,
        length: int = 64,
        classes: int = 10,
    ):
        super().__init__()
        self.embed = nn.Linear(features, hidden)
        self.positions = nn.Parameter(torch.randn(length, hidden) * 0.02)
        self.layers = nn.ModuleList(EncoderBlock(hidden, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, classes)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        x = self.embed(patches) + self.positions[: patches.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class EncoderBlock(nn.Module):
    """Attention and a feed-forward, each behind a norm; x: [B, T, hidden]."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.width = hidden // heads
        self.before, self.between = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.before(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.width)).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))
