"""Tile sizes of the kernels of routed experts, by shape: pure functions, which measurements may replace.

With few tokens two or three programs share a multiprocessor, each with about 16 KB of weights in three stages on their
way: latency times bandwidth of an H200 is 30 KB for each of its multiprocessors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..coded.config import shared_memory
from ..config import next_power_of_two
from .pairs import CodedPairs
from .read import RANKS, Experts, Matrices

FEW = 64
"""The tokens of the largest tile that is bound by the experts' bytes."""


LONG = 4096
"""Channels of a sum from which one program has a multiprocessor to itself; of shorter ones two take turns."""


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

    block_m: the most that it is launched with. Words of codes come in chunks of their own, whatever block_k says.
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
        small, large = TileConfig(16, 32, 32, stages=2), TileConfig(32, 32, 32, stages=2)
        return Tiling(_one(experts), Stage(small, small), Stage(large, large), (8, 8, 8))
    if experts.coded:
        most = FEW // 2 if experts.pairs else FEW  # tokens meet both experts of a pair: twice the sums in registers
        few = Stage(TileConfig(most, 64, 128, stages=4), TileConfig(most, 64, 128, stages=4))
        many = Stage(TileConfig(128, 64, 128, 8), TileConfig(128, 128, 128, 8))
    elif experts.pairs:
        few = Stage(TileConfig(FEW, 64, 64, stages=6), TileConfig(FEW, 64, 64, stages=6))
        many = Stage(TileConfig(128, 128, 64, 8, stages=4), TileConfig(128, 128, 64, 4))
    else:
        few = Stage(TileConfig(FEW, 64, 64, stages=4), TileConfig(FEW, 128, 64, stages=4))
        down = TileConfig(128, 256, 64, 8) if experts.inner >= LONG else TileConfig(128, 128, 64, 4)
        many = Stage(TileConfig(128, 128, 64, 8), down)
    return Tiling(_one(experts), fitting(few, experts, room), fitting(many, experts, room))


def fitting(stage: Stage, experts: Experts, room: int) -> Stage:
    """The tiles with fewer stages, channels, tokens or columns, as far as shared memory asks for it."""
    up, down = stage.up, stage.down
    assert isinstance(up, TileConfig) and isinstance(down, TileConfig)
    while True:
        sizes = shared(up, experts.gate_up, 2, experts.dtype), shared(down, experts.down, 1, experts.dtype)
        if max(sizes) <= room:
            return Stage(up, down)
        tile = up if sizes[0] > room else down
        if tile.stages > 2:
            smaller = replace(tile, stages=tile.stages - 1)
        elif tile.block_k > 32 and not experts.coded:
            smaller = replace(tile, block_k=tile.block_k // 2)
        elif tile.block_m > 32 and experts.coded:  # one table of tiles is for both products
            up, down = (replace(t, block_m=t.block_m // 2) for t in (up, down))
            continue
        elif tile.block_n > 32:
            smaller = replace(tile, block_n=tile.block_n // 2)
        else:
            return Stage(up, down)
        up, down = (smaller if t is tile else t for t in (up, down))


def shared(tile: TileConfig, matrices: Matrices, operands: int, dtype: torch.dtype) -> int:
    """Bytes of shared memory, about: what is read ahead, and of codes a tile of values."""
    coded = matrices.coded
    if coded is None:
        return tile.stages * (operands * tile.block_n + tile.block_m) * tile.block_k * dtype.itemsize
    codes = operands * tile.block_n * coded.chunk * coded.bits // 8
    values = operands * tile.block_n * coded.step * dtype.itemsize * (2 if isinstance(coded, CodedPairs) else 1)
    return tile.stages * (codes + coded.chunk * tile.block_m * dtype.itemsize) + values


def low_rank(beside: TileConfig, dtype: torch.dtype) -> TileConfig:
    """The tile of the product with low ranks: of the same tokens as the product beside it."""
    block_k = 32 if dtype == torch.float32 else 128
    return TileConfig(beside.block_m, RANKS, block_k, 4, 4 if beside.block_m <= FEW else 2, beside.group_m)


def _one(experts: Experts) -> Stage:
    up, down = _row(experts.gate_up, 4096), _row(experts.down, 8192 // next_power_of_two(experts.top))
    if experts.pairs:  # decoding takes registers, and of too many a compiler puts off loads: smaller programs
        up, down = (replace(row, block_n=max(1, row.block_n // 2)) for row in (up, down))
    return Stage(up, down)


def _row(matrices: Matrices, size: int) -> RowConfig:
    """size: numbers of one matrix that a program has on their way at once."""
    size, in_word = max(size, 256), 2 if matrices.words else 1
    if matrices.across:  # neighbours in memory are columns of the output
        return RowConfig(64, size // 64)
    elements = min(next_power_of_two(matrices.width), 1024 if size >= 4096 else 256)
    return RowConfig(max(1, min(8, size // elements)), max(1, elements // in_word))
