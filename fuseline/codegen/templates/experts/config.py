"""Tile sizes of the kernels of routed experts, by shape: pure functions, which measurements may replace."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..coded.config import shared_memory
from ..config import next_power_of_two
from .read import Experts, Matrices


@dataclass(frozen=True)
class RowConfig:
    """One token: block_n output columns by `elements` channels (or words of two) at once."""

    block_n: int
    elements: int
    num_warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class TileConfig:
    """Tiles of block_n output columns, of gates and of ups each, by block_m tokens, block_k channels at once.

    block_m: the most that it is launched with.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int = 4
    stages: int = 3
    group_m: int = 8


@dataclass(frozen=True)
class Stage:
    """Both products of one kind of launch."""

    up: RowConfig | TileConfig
    down: RowConfig | TileConfig


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of all kernels.

    few: bound by the experts' bytes; tiles of 16, 32 or 64 tokens, whichever holds an expert's share. many: bound by
    arithmetic. means: the mean numbers of tokens a group up to which tiles have 16, 32 and 64; beyond, `many` serves.
    """

    one: Stage
    few: Stage
    many: Stage
    means: tuple[int, int, int] = (6, 16, 40)


def tiling(experts: Experts) -> Tiling:
    """The tile sizes for a region."""
    room = shared_memory(experts.given["hidden"].meta["val"].device)
    if experts.dtype == torch.float32:  # no tensor cores: float32 is multiplied as IEEE says
        few, many = TileConfig(16, 32, 32, stages=2), TileConfig(32, 32, 32, stages=2)
        return Tiling(_one(experts), Stage(few, few), Stage(many, many), (8, 8, 8))
    if experts.pairs:
        few = Stage(TileConfig(64, 64, 64, stages=4), TileConfig(64, 64, 128, stages=4))
        many = Stage(TileConfig(128, 128, 64, 8), TileConfig(128, 128, 64, 8))
    else:
        few = Stage(TileConfig(64, 64, 128), TileConfig(64, 128, 128))
        many = Stage(TileConfig(128, 128, 64, 8), TileConfig(128, 256, 64, 8))
    itemsize = experts.dtype.itemsize
    return Tiling(
        _one(experts), *(Stage(within(s.up, 2, itemsize, room), within(s.down, 1, itemsize, room)) for s in (few, many))
    )


def within(tile: RowConfig | TileConfig, matrices: int, itemsize: int, room: int) -> TileConfig:
    """The tile with fewer stages, channels or columns, as far as shared memory asks for it."""
    assert isinstance(tile, TileConfig)
    while tile.stages * (matrices * tile.block_n + tile.block_m) * tile.block_k * itemsize > room:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.block_k > 32:
            tile = replace(tile, block_k=tile.block_k // 2)
        elif tile.block_n > 32:
            tile = replace(tile, block_n=tile.block_n // 2)
        else:
            break
    return tile


def _one(experts: Experts) -> Stage:
    return Stage(_row(experts.gate_up, 4096), _row(experts.down, 8192 // next_power_of_two(experts.top)))


def _row(matrices: Matrices, size: int) -> RowConfig:
    """size: numbers of one matrix that a program has on their way at once."""
    size, in_word = max(size, 256), 2 if matrices.words else 1
    if matrices.across:  # neighbours in memory are columns of the output
        return RowConfig(64, size // 64)
    elements = min(next_power_of_two(matrices.width), 1024 if size >= 4096 else 256)
    return RowConfig(max(1, min(8, size // elements)), max(1, elements // in_word))
