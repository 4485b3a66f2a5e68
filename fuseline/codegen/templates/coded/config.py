"""Tile sizes of the template for coded weights, by shape: pure functions, which measurements may replace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..anchor import Anchor
from .weight import Coded

FEW_ROWS = 64
"""Up to this many rows a tile holds them all, in blocks of 16, 32 or 64, and its channels may be shared out."""
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200
HOPPER = 227 << 10  # bytes of shared memory


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
    weight = anchor.linears[0].coded
    widest = max(len(section.linears) for section in anchor.sections)
    room = shared_memory(anchor.x.meta["val"].device)
    if target == torch.float32:  # no tensor cores: float32 is multiplied as IEEE says
        return CodedTiling(Tile(16, 32, stages=2), Tile(32, 32, stages=2, scale_after=False))
    block_n = 64 if widest > 1 or anchor.columns < 16384 else 128
    tiles = sum(-(-section.n // block_n) for section in anchor.sections)
    few = within(Tile(16, block_n, split(weight, tiles)), 64, weight, target, widest, room)
    block_m, stages = (128, 3) if weight.chunk == weight.step else (64, 2)  # each tl.dot keeps an x of its own
    many = Tile(block_m, 64 if widest > 1 else 128, num_warps=8, stages=stages, scale_after=False)
    return CodedTiling(few, within(many, many.block_m, weight, target, widest, room))


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use: of the GPU that is there, else of Hopper."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", 0)) or 64 << 10


def within(tile: Tile, rows: int, weight: Coded, target: torch.dtype, linears: int, room: int) -> Tile:
    """The tile with fewer stages, rows or columns, as far as `room` asks for it. rows: the most that it may hold."""
    while shared(tile, rows, weight, target, linears) > room:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.block_m == rows and rows > 32:
            rows //= 2
            tile = replace(tile, block_m=rows)
        elif tile.block_n > 32:
            tile = replace(tile, block_n=tile.block_n // 2)
        else:
            return tile
    return tile


def shared(tile: Tile, rows: int, weight: Coded, target: torch.dtype, linears: int) -> int:
    """Bytes of shared memory, about: what is read ahead, and one tile of values."""
    codes = tile.block_n * weight.chunk * weight.element.bits // 8 * linears
    return tile.stages * (codes + weight.chunk * rows * target.itemsize) + tile.block_n * weight.step * target.itemsize


def split(weight: Coded, tiles: int) -> int:
    """Programs for each tile so that there are PROGRAMS, each with at least two turns of the loop."""
    fitting = [s for s in range(1, weight.chunks + 1) if weight.chunks % s == 0 and weight.chunks // s >= 2]
    return next((s for s in fitting if s * tiles >= PROGRAMS), max(fitting, default=1))
