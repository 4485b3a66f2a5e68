"""Tile sizes of the template for coded weights, by shape: pure functions, which measurements may replace."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..anchor import Anchor
from .weight import Coded

FEW_ROWS = 64
"""Up to this many rows a tile holds them all, in blocks of 16, 32 or 64, and its channels may be shared out."""
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


@dataclass(frozen=True)
class Tile:
    """Tiles of block_n columns by block_m rows; `split` programs share a tile's channels (it divides a row's chunks).

    scale_after: groups' sums are scaled where it is possible, not values.
    """

    block_m: int
    block_n: int
    split: int = 1
    num_warps: int = 4
    stages: int = 4
    group_m: int = 8
    scale_after: bool = True


@dataclass(frozen=True)
class CodedTiling:
    """few: up to FEW_ROWS rows, whose block_m is the least that holds them; many: more."""

    few: Tile
    many: Tile
    few_rows: int = FEW_ROWS


def tiling(anchor: Anchor, target: torch.dtype) -> CodedTiling:
    """The tile sizes for a region; target: the type that is multiplied."""
    weight = anchor.linears[0].weight
    assert isinstance(weight, Coded)
    widest = max(len(section.linears) for section in anchor.sections)
    if target == torch.float32:  # no tensor cores: float32 is multiplied as IEEE says
        return CodedTiling(Tile(16, 32, stages=2), Tile(32, 32, stages=2, scale_after=False))
    block_n = 64 if widest > 1 or anchor.columns < 16384 else 128
    tiles = sum(-(-section.n // block_n) for section in anchor.sections)
    few = Tile(16, block_n, split(weight, tiles))
    block_m, stages = (128, 3) if weight.chunk == weight.step else (64, 2)  # each tl.dot keeps an x of its own
    many = Tile(block_m, 64 if widest > 1 else 128, num_warps=8, stages=stages, scale_after=False)
    return CodedTiling(few, many)


def split(weight: Coded, tiles: int) -> int:
    """Programs for each tile so that there are PROGRAMS, each with at least two turns of the loop."""
    fitting = [s for s in range(1, weight.chunks + 1) if weight.chunks % s == 0 and weight.chunks // s >= 2]
    return next((s for s in fitting if s * tiles >= PROGRAMS), max(fitting, default=1))
