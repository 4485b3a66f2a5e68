"""Movements between placements, in functional collectives that carry gradients.

All are made of three: all_to_all_single, all_gather_into_tensor and reduce_scatter_tensor, whose derivatives are one
another's, so the convention of `placement.py` holds by construction. Each exchange has the ranks as its first
dimension: split sizes are then ones, whatever the symbolic sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...compiler.compat import collectives
from .placement import Axis, Shard


@dataclass(frozen=True)
class Group:
    """The ranks among which a sequence is cut: the process group's name, its size, and this process's place in it."""

    name: str
    degree: int
    rank: int

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x: [degree, …], row r for rank r → [degree, …], row r from rank r."""
        ones = [1] * self.degree
        sent = collectives().all_to_all_single(x.contiguous(), ones, ones, self.name)
        return torch.ops._c10d_functional.wait_tensor(sent)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x: […] → [degree, …]."""
        sent = collectives().all_gather_into_tensor(x.contiguous().unsqueeze(0), self.degree, self.name)
        return torch.ops._c10d_functional.wait_tensor(sent)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; its gradient is summed over them too. For scalars and rows, not for activations."""
        return self.all_gather(x).sum(0)

    def positions(self, axis: Axis, device: torch.device) -> torch.Tensor:
        """The positions that this rank holds, [block]; beyond the sequence's end they go on."""
        if axis.zigzag:
            ranks = self.degree // axis.zigzag
            member, place = divmod(self.rank, ranks)
            half = axis.block * ranks // 2
            chunks = (member, 2 * axis.zigzag - 1 - member)
            both = torch.cat([torch.arange(c * half, c * half + half, device=device) for c in chunks])
            return both.narrow(0, place * axis.block, axis.block)
        start = self.start(axis)
        return torch.arange(start, start + axis.block, device=device)

    def start(self, axis: Axis) -> Any:
        """The first position that this rank holds, where they lie in order."""
        return self.rank * axis.block

    def valid(self, shard: Shard, rank_of_tensor: int, device: torch.device) -> torch.Tensor:
        """Which of this rank's elements along the sharded dimension exist: a mask that broadcasts."""
        inside = self.positions(shard.axis, device) < shard.axis.length
        inside = inside[None, :, None].expand(shard.outer, shard.axis.block, shard.inner).reshape(-1)
        return inside.view([-1 if d == shard.dim else 1 for d in range(rank_of_tensor)])

    def take(self, x: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Replicate → Shard, without communication. Positions beyond the end repeat the last one."""
        axis, dim = shard.axis, shard.dim
        whole = x.unflatten(dim, (shard.outer, axis.length, shard.inner))
        if axis.even and not axis.zigzag:
            mine = whole.narrow(dim + 1, self.start(axis), axis.block)
        else:
            at = self.positions(axis, x.device).clamp(max=axis.length - 1)
            mine = whole.index_select(dim + 1, at)
        return mine.reshape(shard.shape(x.shape))

    def gather(self, x: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Shard → Replicate; the gradient is reduced and scattered."""
        axis, dim = shard.axis, shard.dim
        parts = self.all_gather(x.unflatten(dim, (shard.outer, axis.block, shard.inner)))
        if axis.zigzag:  # of 2·n chunks 0 … n − 1 are the members' first halves, the others the second ones backwards
            ranks = self.degree // axis.zigzag
            members = parts.unflatten(0, (axis.zigzag, ranks)).movedim(1, dim + 2).flatten(dim + 2, dim + 3)
            first, second = members.unflatten(dim + 2, (2, axis.block * ranks // 2)).unbind(dim + 2)
            parts = torch.cat((first, second.flip(0)))
        whole = parts.movedim(0, dim + 1).flatten(dim + 1, dim + 2)  # [..., outer, degree · block, inner, ...]
        if not axis.even:
            whole = whole.narrow(dim + 1, 0, axis.length)
        size = shard.outer * axis.length * shard.inner
        return whole.reshape([*x.shape[:dim], size, *x.shape[dim + 1 :]])

    def sequence_to_heads(self, x: torch.Tensor, dim: int, axis: Axis, heads: int) -> torch.Tensor:
        """x: its block of `axis` along `dim`, all of dimension `heads`, a whole multiple of the degree → all of the
        sequence, 1/degree of the heads."""
        parts = self.all_to_all(x.unflatten(heads, (self.degree, -1)).movedim(heads, 0))
        whole = parts.movedim(0, dim).flatten(dim, dim + 1)
        return whole if axis.even else whole.narrow(dim, 0, axis.length)

    def heads_to_sequence(self, x: torch.Tensor, dim: int, axis: Axis, heads: int) -> torch.Tensor:
        """The way back."""
        there = pad_to(x, dim, self.degree * axis.block, axis).unflatten(dim, (self.degree, axis.block))
        parts = self.all_to_all(there.movedim(dim, 0))
        return parts.movedim(0, heads).flatten(heads, heads + 1)


def pad_to(x: torch.Tensor, dim: int, size: Any, axis: Axis) -> torch.Tensor:
    """Zeros behind the end of a sequence whose last blocks are short."""
    if axis.even:
        return x
    behind = [0] * (2 * (x.dim() - 1 - dim % x.dim()))
    return F.pad(x, [*behind, 0, size - axis.length])
