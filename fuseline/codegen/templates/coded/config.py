"""Tile sizes of the template for coded weights, by shape: pure functions, which measurements may replace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..anchor import Anchor
from .weight import Coded

FEW_ROWS = 64
"""Up to this many rows a tile holds them all, in blocks of 8, 16, 32 or 64, and its channels may be shared out."""
LEAST_ROWS = 8  # of a tile: instructions for 8 multiply as fast as they can be fed, and leave registers
AMD_ROWS = 16  # whose instructions want more
SOME_ROWS = 512
PROGRAMS = 528  # at once on an H100 or H200: four on each multiprocessor, whose registers 128 threads of 128 fill
TURNS = 2  # of a program's loop, at least: fewer do not pay for its beginning and end
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
    fit = lambda tile: within(replace(tile, scale_after=False), weight, target, widest, room)
    if target == torch.float32:  # no tensor cores: float32 is multiplied as IEEE says
        few = within(Tile(FEW_ROWS, 32, stages=2), weight, target, widest, room)
        return CodedTiling(replace(few, block_m=16), fit(Tile(32, 32, stages=2)), few.block_m)
    few = fewer(anchor, weight, target, widest, room)
    least = LEAST_ROWS if torch.version.hip is None else AMD_ROWS
    few, rows = replace(few, block_m=least), few.block_m
    if weight.chunk > weight.step:  # each tl.dot keeps an x of its own
        return CodedTiling(few, fit(Tile(64, 64 if widest > 1 else 128, 1, 8, 2)), rows)
    if widest > 1:
        return CodedTiling(few, fit(Tile(128, 64, 1, 8, 3)), rows)
    large = 256 if weight.element.bits <= 4 and target.is_floating_point else 128
    many = fit(Tile(large, 128, 1, 8, 3))
    if anchor.columns >= 16384:
        return CodedTiling(few, many, rows)
    small = Tile(128, 128, 1, 8, 3) if anchor.columns > 4096 else Tile(128, 64, 1, 4, 3)
    return CodedTiling(few, many, rows, fit(small))


def fewer(anchor: Anchor, weight: Coded, target: torch.dtype, widest: int, room: int) -> Tile:
    """The tile for the most of few rows. Programs that share out channels have one linear each, others all meeting."""
    narrow = weight.element.bits > 4
    block_n = 64 if narrow or min(linear.n for linear in anchor.linears) < 128 else 128
    tiles = sum(-(-linear.n // block_n) for linear in anchor.linears)
    parts = split(weight, tiles)
    if parts == 1 and widest > 1:
        block_n = 64
    linears = widest if parts == 1 else 1
    return within(Tile(FEW_ROWS, block_n, parts, stages=3), weight, target, linears, room)


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may use: of the GPU that is there, else of Hopper."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", 0)) or 64 << 10


def within(tile: Tile, weight: Coded, target: torch.dtype, linears: int, room: int) -> Tile:
    """The tile with fewer stages, rows or columns, as far as `room` asks for it; at last nothing is read ahead."""
    while shared(tile, weight, target, linears) > room:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.block_m > 32:
            tile = replace(tile, block_m=tile.block_m // 2)
        elif tile.block_n > 32:
            tile = replace(tile, block_n=tile.block_n // 2)
        elif tile.block_m > 16:
            tile = replace(tile, block_m=tile.block_m // 2)
        elif tile.stages > 1:
            tile = replace(tile, stages=1)
        else:
            return tile
    return tile


def shared(tile: Tile, weight: Coded, target: torch.dtype, linears: int) -> int:
    """Bytes of shared memory, at most, from compute capability 8.0 on: what is read ahead, and a dot's values on their
    way between threads.

    Hopper's tensor cores read x where it lies, so that it has a place a stage; elsewhere a stage is in registers.
    """
    codes = (tile.stages - 1) * tile.block_n * weight.chunk * weight.element.bits // 8 * linears
    places = tile.stages if target.itemsize < 4 else tile.stages - 1
    x = max(places * weight.chunk, weight.step) * tile.block_m * target.itemsize
    values = tile.block_n * weight.step * target.itemsize * linears
    if target.itemsize == 2 and weight.chunk == weight.step and not tile.scale_after:
        values //= 4  # they come from words in the order in which they are multiplied
    return codes + x + values


def split(weight: Coded, tiles: int) -> int:
    """Programs for each tile, as many as run at once."""
    fitting = [s for s in range(1, weight.chunks + 1) if weight.chunks % s == 0 and weight.chunks // s >= TURNS]
    return max((s for s in fitting if s * tiles <= PROGRAMS), default=1)
