"""A small decoder in plain PyTorch: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class TinyDecoder(nn.Module):
    """ids [B, T] int64 → logits [B, T, vocabulary]; nothing but torch is needed to build it."""

    def __init__(self, vocabulary: int = 512, hidden: int = 128, layers: int = 2, heads: int = 4, kv_heads: int = 2):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Block(hidden, 3 * hidden, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden, eps=1e-5)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Block(nn.Module):
    """Attention and a gated feed-forward, each behind a norm; x: [B, T, hidden]."""

    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int):
        super().__init__()
        self.width = hidden // heads
        self.groups = heads // kv_heads
        self.attention_norm, self.feed_forward_norm = nn.RMSNorm(hidden, eps=1e-5), nn.RMSNorm(hidden, eps=1e-5)
        self.q = nn.Linear(hidden, heads * self.width, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.width, bias=False)
        self.o = nn.Linear(heads * self.width, hidden, bias=False)
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.attention_norm(x)
        cos, sin = angles(x.shape[1], self.width, x)
        q = rotate(self._heads(self.q(h)), cos, sin)
        k = rotate(self._heads(self.k(h)), cos, sin).repeat_interleave(self.groups, dim=1)
        v = self._heads(self.v(h)).repeat_interleave(self.groups, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))

    def feed_forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(h)) * self.up(h))

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, heads·width] → [B, heads, T, width]."""
        return x.unflatten(-1, (-1, self.width)).transpose(1, 2)


def angles(length: int, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position times frequency, each [length, width], in `like`'s dtype (Su et al., 2021)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=like.device, dtype=torch.float32) / width)
    angle = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding over halves, as Llama pairs them; x: [B, heads, T, width]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
