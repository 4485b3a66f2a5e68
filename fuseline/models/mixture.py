"""A small decoder with routed experts: attention as in `decoder.py`, a mixture in the place of each feed-forward."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fuseline.compiler import ops
from fuseline.models.decoder import Block, TinyDecoder


class TinyMixture(TinyDecoder):
    """ids [B, T] int64 → logits [B, T, vocabulary].

    experts: of each layer, of which each token takes `chosen`; inner: an expert's width.
    """

    def __init__(
        self, vocabulary: int = 256, hidden: int = 128, layers: int = 2, heads: int = 4, kv_heads: int = 2,
        experts: int = 16, chosen: int = 2, inner: int = 128,
    ):  # fmt: skip
        super().__init__(vocabulary, hidden, 0, heads, kv_heads)
        self.layers = nn.ModuleList(
            MixtureBlock(hidden, heads, kv_heads, experts, chosen, inner) for _ in range(layers)
        )

    def balance(self) -> torch.Tensor:
        """The load-balancing loss of the last training step, a mean over layers (Fedus et al., 2022): 1 at best."""
        return torch.stack([layer.experts.balance for layer in self.layers]).mean()


class MixtureBlock(Block):
    """Attention and a mixture of experts, each behind a norm; x: [B, T, hidden]."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, experts: int, chosen: int, inner: int):
        super().__init__(hidden, 1, heads, kv_heads)
        del self.gate, self.up, self.down
        self.experts = Mixture(hidden, experts, chosen, inner)

    def feed_forward(self, h: torch.Tensor) -> torch.Tensor:
        return self.experts(h)


class Mixture(nn.Module):
    """Softmax over all experts, the `chosen` most probable ones, their weights renormalised; x: [B, T, hidden]."""

    def __init__(self, hidden: int, experts: int, chosen: int, inner: int):
        super().__init__()
        self.chosen = chosen
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * inner, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, inner) * inner**-0.5)
        self.balance = torch.ones(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, -2)
        odds = F.softmax(self.router(rows).float(), -1)
        weights, indices = odds.topk(self.chosen, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.training:
            share = F.one_hot(indices, odds.shape[-1]).sum(1).float().mean(0) / self.chosen
            self.balance = (share * odds.mean(0)).sum() * odds.shape[-1]
        dtype = torch.bfloat16 if torch.is_autocast_enabled(x.device.type) else x.dtype
        matrices = (self.gate_up.to(dtype), self.down.to(dtype))
        return ops.moe(rows.to(dtype), indices, weights, *matrices).to(x.dtype).view_as(x)
