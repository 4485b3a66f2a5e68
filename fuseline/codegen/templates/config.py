"""Tile sizes of the linear kernels, by shape. Pure functions, so that measurements can replace the choice.

One row: memory-bound. A program covers a few output columns and strides along the inputs. The tiles below are within
4 to 14% (geometric mean over the shapes) of the best of 781 candidates on an H100: `benchmarks/linear_kernels.py`,
`benchmarks/results/2026-11-22-h100-linear.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .anchor import Anchor
from .weights import power_of_two_divisor

# Up to this many rows each one is a matrix-vector product of its own; the rows of a weight come from L2 again.
ROW_KERNEL_MAX = 4
# Up to this many rows the tile kernel uses its smallest tile.
FEW_ROWS_MAX = 32
FEW_ROWS_BLOCK_M = 16  # the least that tl.dot takes
# A run of inputs with one scale is read in pieces of this size; longer ones in several.
PIECE_MAX = 64


@dataclass(frozen=True)
class RowConfig:
    """The one-row kernel: `block_n` output columns of each linear, `elements` stored elements of a weight at once."""

    block_n: int
    elements: int
    num_warps: int
    stages: int = 1


@dataclass(frozen=True)
class TileConfig:
    """The many-row kernel: tiles of block_m rows by block_n columns; `block_k` stored elements at once."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 8
    num_warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Tiling:
    """Tile sizes of both kernels; up to `row_max` rows are served by the one-row kernel."""

    row: RowConfig
    tile: TileConfig
    row_max: int = ROW_KERNEL_MAX


def tiling(anchor: Anchor) -> Tiling:
    """The tile sizes for a region."""
    widest = max(len(s.linears) for s in anchor.sections)
    weights = [linear.plain for linear in anchor.linears]
    stored = max(w.stored for w in weights)
    bits = max(w.bits for w in weights)
    shortest = min(power_of_two_divisor(w.run, 64) for w in weights if w.bits) if any(w.bits for w in weights) else 64
    return Tiling(
        row_config(anchor.columns, stored, bits),
        tile_config(anchor.columns, shortest, anchor.dtype.itemsize, widest),
    )


SMALL = 4 << 20  # stored elements; below, a launch is too short to fill the memory system whatever the tile


def row_config(columns: int, stored: int, bits: int) -> RowConfig:
    """columns: output columns of the launch; stored: elements of a weight row; bits: 8 or 4, 0 for float weights."""
    small = columns * stored < SMALL
    if bits == 4:
        chosen = RowConfig(2, 512, 4) if small else RowConfig(4, 512, 4)
    elif bits == 8:
        chosen = RowConfig(1, 256, 1) if small else RowConfig(2, 512, 2)
    else:
        chosen = RowConfig(4, 1024, 8) if small else RowConfig(1, 1024, 4)
    return replace(chosen, elements=min(next_power_of_two(stored), chosen.elements))


def tile_config(columns: int, run: int, itemsize: int, linears: int) -> TileConfig:
    """run: the power of two that divides every scale's run (64 without scales); itemsize: of the product's dtype.

    Where a run is shorter than the least tile of tl.dot, tiles cross runs and each weight finds its own scale.
    """
    if itemsize == 4:  # no tensor cores: float32 is multiplied as IEEE says
        return TileConfig(32, 32, 16 if run < 32 else 32, stages=2)
    block_n = 64 if linears > 1 or columns < 4096 else 128
    return TileConfig(64, block_n, max(run, 16), num_warps=8 if block_n == 128 else 4)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
