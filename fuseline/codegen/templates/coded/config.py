"""Tile sizes of the template for coded weights, by shape: pure functions, which measurements may replace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..anchor import Anchor
from .weight import Coded

FEW_ROWS = 64
"""Up to this many rows a tile holds them all, in blocks of 16, 32 or 64, and its channels may be shared out."""
SOME_ROWS = 512
PROGRAMS = 528  # at once on an H100 or H200: four on each multiprocessor, whose registers 128 threads of 128 fill
TURNS = 4  # of a program's loop, at least: fewer do not pay for its beginning and end
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
    """few: up to FEW_ROWS rows, whose block_m is the least that holds them; many: more; some: up to SOME_ROWS of those,
    which leave multiprocessors idle in `many`'s tiles. None: as many."""

    few: Tile
    many: Tile
    few_rows: int = FEW_ROWS
    some: Tile | None = None
    some_rows: int = SOME_ROWS


def tiling(anchor: Anchor, target: torch.dtype) -> CodedTiling:
    """The tile sizes for a region; target: the type that is multiplied."""
    weight = anchor.linears[0].coded
    widest = max(len(section.linears) for section in anchor.sections)
    room = shared_memory(anchor.x.meta["val"].device)
    if target == torch.float32:  # no tensor cores: float32 is multiplied as IEEE says
        return CodedTiling(Tile(16, 32, stages=2), Tile(32, 32, stages=2, scale_after=False))
    few = fewer(anchor, weight, target, widest, room)
    fit = lambda tile: within(tile, tile.block_m, weight, target, widest, room)
    if weight.chunk > weight.step:  # each tl.dot keeps an x of its own
        return CodedTiling(few, fit(Tile(64, 64 if widest > 1 else 128, 1, 8, 2, scale_after=False)))
    if widest > 1:
        return CodedTiling(few, fit(Tile(128, 64, 1, 8, 3, scale_after=False)))
    large = 256 if weight.element.bits <= 4 and target.is_floating_point else 128
    many = fit(Tile(large, 128, 1, 8, 3, scale_after=False))
    if anchor.columns >= 16384:
        return CodedTiling(few, many)
    small = Tile(128, 128, 1, 8, 3) if anchor.columns > 4096 else Tile(128, 64, 1, 4, 3)
    return CodedTiling(few, many, some=fit(replace(small, scale_after=False)))


def fewer(anchor: Anchor, weight: Coded, target: torch.dtype, widest: int, room: int) -> Tile:
    """The tile for few rows. Programs that share out channels have one linear each, others all that meet."""
    narrow = weight.element.bits > 4
    block_n = 64 if narrow or min(linear.n for linear in anchor.linears) < 128 else 128
    tiles = sum(-(-linear.n // block_n) for linear in anchor.linears)
    parts = split(weight, tiles)
    if parts == 1 and widest > 1:
        block_n = 64
    linears = widest if parts == 1 else 1
    return within(Tile(16, block_n, parts, stages=3), 64, weight, target, linears, room)


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
    """Bytes of shared memory, about: what is read ahead, and scales."""
    codes = tile.block_n * weight.chunk * weight.element.bits // 8 * linears
    x = tile.stages * weight.chunk * rows * target.itemsize
    return (tile.stages - 1) * codes + x + tile.block_n * weight.chunk


def split(weight: Coded, tiles: int) -> int:
    """Programs for each tile, as many as run at once."""
    fitting = [s for s in range(1, weight.chunks + 1) if weight.chunks % s == 0 and weight.chunks // s >= TURNS]
    return max((s for s in fitting if s * tiles <= PROGRAMS), default=1)
