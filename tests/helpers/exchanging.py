"""Llama-like blocks whose attention is split over heads among a group, by all-to-alls on each side of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


@contextlib.contextmanager
def fake_group(size: int) -> Iterator[str]:
    """A process group of that size of which this process is the first; nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


class Block(nn.Module):
    """x: [length, width], a part of the sequence; products: qkv, o, gate, up, down."""

    def __init__(self, width: int, heads: int, inner: int, group: str, world: int):
        super().__init__()
        self.heads, self.group, self.world = heads, group, world
        self.first, self.second = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.qkv, self.o = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(_norm(x, self.first)).split(x.shape[-1], -1)
        mixed = F.scaled_dot_product_attention(self._to_heads(q), self._to_heads(k), self._to_heads(v), is_causal=True)
        x = x + self.o(self._to_sequence(mixed))
        h = _norm(x, self.second)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    def _exchange(self, x: torch.Tensor) -> torch.Tensor:
        parts = [x.shape[0] // self.world] * self.world
        y = torch.ops._c10d_functional_autograd.all_to_all_single(x, parts, parts, self.group)
        return torch.ops._c10d_functional.wait_tensor(y)

    def _to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[S, width] → [1, heads / world, world·S, size]."""
        length, size = x.shape[0], x.shape[1] // self.heads
        x = x.reshape(length, self.world, self.heads // self.world, size).permute(1, 0, 2, 3).contiguous()
        return self._exchange(x).reshape(self.world * length, self.heads // self.world, size).permute(1, 0, 2)[None]

    def _to_sequence(self, x: torch.Tensor) -> torch.Tensor:
        _, heads, length, size = x.shape
        x = x[0].permute(1, 0, 2).reshape(self.world, length // self.world, heads, size).contiguous()
        return self._exchange(x).permute(1, 0, 2, 3).reshape(length // self.world, -1)


class Blocks(nn.Module):
    """Blocks in a row."""

    def __init__(self, count: int, width: int, heads: int, inner: int, group: str, world: int):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, inner, group, world) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight
