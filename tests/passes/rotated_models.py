"""Transformers written out in plain PyTorch, without a cast, with the choices that matter to rotations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

VOCABULARY = 11


@dataclass(frozen=True)
class Shape:
    """norm: rms, unit (1 + w) or layer; mlp: gated, plain or fused (gate and up in one product)."""

    width: int = 12
    heads: int = 2
    groups: int = 1
    head: int = 6
    inner: int = 20
    layers: int = 2
    norm: str = "rms"
    mlp: str = "gated"
    fused: bool = False  # q, k and v in one product
    bias: bool = False
    tied: bool = False
    parallel: bool = False  # attention and MLP read the same norm
    sandwich: bool = False  # a norm behind each block, as in Gemma 2
    gate: bool = False  # the attention's result is gated channel by channel
    scale: float = 1.0  # of what a block adds
    by_head: bool = False  # a joint product holds q, k and v of each group of heads together
    q_norm: bool = False  # RMSNorms of queries and keys, by head
    experts: int = 0  # of which each token takes two, a matrix for each token
    shared: bool = False  # one more, for all tokens

    @property
    def pre_norm(self) -> bool:
        """Whether norms that commute with rotations stand before the blocks, and nothing reads single channels."""
        return self.norm in ("rms", "unit") and not self.sandwich and not self.gate


shapes = st.builds(
    Shape,
    width=st.sampled_from((8, 12, 20)),
    heads=st.sampled_from((2, 4)),
    groups=st.sampled_from((1, 2)),
    head=st.sampled_from((4, 6)),
    inner=st.sampled_from((16, 20)),
    layers=st.integers(1, 2),
    norm=st.sampled_from(("rms", "unit", "layer")),
    mlp=st.sampled_from(("gated", "plain", "fused")),
    experts=st.sampled_from((0, 0, 3)),
    **{name: st.booleans() for name in ("fused", "bias", "tied", "parallel", "by_head", "q_norm", "shared")},
    **{name: st.sampled_from((False, False, True)) for name in ("sandwich", "gate")},
    scale=st.sampled_from((1.0, 0.25)),
)


class Norm(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.kind = shape.norm
        self.weight = nn.Parameter(torch.rand(shape.width) + 0.5)
        self.bias = nn.Parameter(torch.randn(shape.width)) if shape.norm == "layer" else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, 1e-5)
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return h * (1.0 + self.weight) if self.kind == "unit" else self.weight * h


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.s = s = shape
        keys = s.heads // s.groups
        self.sizes = [s.heads * s.head, keys * s.head, keys * s.head]
        parts = [sum(self.sizes)] if s.fused else self.sizes
        self.qkv = nn.ModuleList(nn.Linear(s.width, n, bias=s.bias) for n in parts)
        self.gate = nn.Linear(s.width, s.heads * s.head, bias=False) if s.gate else None
        self.out = nn.Linear(s.heads * s.head, s.width, bias=s.bias)
        self.scales = nn.ParameterList(torch.rand(s.head) + 0.5 for _ in range(2 * s.q_norm))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        made = [linear(x) for linear in self.qkv]
        if self.s.fused and self.s.by_head:
            groups = made[0].view(batch, tokens, self.s.heads // self.s.groups, self.s.groups + 2, self.s.head)
            made = [groups[..., : self.s.groups, :].reshape(batch, tokens, -1), groups[..., -2, :], groups[..., -1, :]]
        elif self.s.fused:
            made = list(made[0].split(self.sizes, -1))
        q, k, v = (t.reshape(batch, tokens, -1, self.s.head).transpose(1, 2) for t in made)
        if self.s.q_norm:
            q, k = (F.rms_norm(t, (self.s.head,), weight, 1e-5) for t, weight in zip((q, k), self.scales, strict=True))
        k, v = (t.repeat_interleave(self.s.groups, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).reshape(batch, tokens, -1)
        return self.out(y if self.gate is None else y * torch.sigmoid(self.gate(x)))


class Mlp(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        s, self.kind = shape, shape.mlp
        self.up = nn.Linear(s.width, s.inner * (2 if s.mlp == "fused" else 1), bias=s.bias)
        self.gate = nn.Linear(s.width, s.inner, bias=s.bias) if s.mlp == "gated" else None
        self.down = nn.Linear(s.inner, s.width, bias=s.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "plain":
            return self.down(F.gelu(self.up(x)))
        gate, up = self.up(x).chunk(2, -1) if self.gate is None else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


class Experts(nn.Module):
    """Two of the experts for each token, whose matrices are gathered by token; columns where `shared` is not."""

    def __init__(self, shape: Shape):
        super().__init__()
        s = self.s = shape
        self.router = nn.Linear(s.width, s.experts, bias=s.bias)
        self.up = nn.Parameter(torch.randn(s.experts, 2 * s.inner, s.width) * s.width**-0.5)
        self.down = nn.Parameter(torch.randn(s.experts, s.width, s.inner) * s.inner**-0.5)
        self.shared = Mlp(s) if s.shared else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.s.width)
        weights, chosen = torch.softmax(self.router(flat), -1).topk(2, -1)
        weights /= weights.sum(-1, keepdim=True)
        rows, index = flat.repeat_interleave(2, 0), chosen.reshape(-1)
        gate, up = self._times(self.up[index], rows).chunk(2, -1)
        made = self._times(self.down[index], F.silu(gate) * up) * weights.reshape(-1, 1)
        mixed = made.view(-1, 2, self.s.width).sum(1).view(x.shape)
        return mixed if self.shared is None else mixed + self.shared(x)

    def _times(self, matrices: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if self.s.shared:
            return torch.bmm(rows[:, None], matrices.transpose(1, 2)).squeeze(1)
        return torch.bmm(matrices, rows[..., None]).squeeze(-1)


class Decoder(nn.Module):
    """Token ids [batch, tokens] → logits."""

    def __init__(self, shape: Shape, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.s = shape
        self.embed = nn.Embedding(VOCABULARY, shape.width)
        count = 4 if shape.sandwich else 2
        self.norms = nn.ModuleList(nn.ModuleList(Norm(shape) for _ in range(count)) for _ in range(shape.layers))
        self.attentions = nn.ModuleList(Attention(shape) for _ in range(shape.layers))
        self.mlps = nn.ModuleList((Experts if shape.experts else Mlp)(shape) for _ in range(shape.layers))
        self.norm, self.head = Norm(shape), nn.Linear(shape.width, VOCABULARY, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight
        self.double().eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        s, x = self.s, self.embed(ids) * math.sqrt(self.s.width)
        for norms, attention, mlp in zip(self.norms, self.attentions, self.mlps, strict=True):
            after = norms[2:] if s.sandwich else (nn.Identity(), nn.Identity())
            h = norms[0](x)
            if s.parallel:
                x = x + s.scale * (after[0](attention(h)) + after[1](mlp(h)))
            else:
                x = x + s.scale * after[0](attention(h))
                x = x + s.scale * after[1](mlp(norms[1](x)))
        return self.head(self.norm(x))
