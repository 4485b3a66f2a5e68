"""The norm before a linear, as kernel text: row statistics, and how a loaded tile is normalised.

Everything is float32: the graph may round between the norm's steps, a kernel does not.

In the one-row kernel RMSNorm costs no pass of its own: rsqrt(mean(x²) + eps) is one number for the row, so it is
multiplied to the finished product, and the squares are summed while the product reads x. LayerNorm subtracts a mean,
and the many-row kernel rounds h to the product's dtype; there a first pass over the row takes the statistics.
"""

from __future__ import annotations

from .anchor import Anchor
from .config import next_power_of_two
from .text import Text, load


def statistics(text: Text, anchor: Anchor, tile: bool, most: int = 1024) -> None:
    """The first pass: defines `rstd` and, for LayerNorm, `mean`; one number, or a column of BLOCK_M for a tile.

    most: channels at a time, of one row.
    """
    norm, k = anchor.norm, anchor.k
    assert norm is not None
    width = min(next_power_of_two(k), 128 if tile else most)
    rows, column, axis = ("x_rows", "[None, :]", 1) if tile else ("x_row", "", 0)
    shape = f"(BLOCK_M, {width})" if tile else f"({width},)"
    reduced = f"tl.sum(total, {axis}{', keep_dims=True' if tile else ''})"
    live = f"(k < {k}){column}" if k % width else None
    conditions = ("inside_m" if tile else None, live)

    def sweep(term: str, *before: str) -> None:
        text.add(f"total = tl.zeros({shape}, tl.float32)")
        with text.block(f"for k0 in range(0, {k}, {width}):"):
            text.add(f"k = k0 + tl.arange(0, {width})")
            text.add(f"x = {load(f'{rows} + k{column}', conditions)}.to(tl.float32)", *before, f"total += {term}")

    if norm.rms:
        sweep("x * x")
    else:
        sweep("x")
        text.add(f"mean = {reduced} / {k}")
        sweep("x * x", f"x = tl.where({live}, x - mean, 0.0)" if live else "x = x - mean")
    text.add(f"rstd = tl.rsqrt({reduced} / {k} + {norm.eps!r})")


def scaled(anchor: Anchor, x: str, k: str, live: str | None) -> str:
    """x times the norm's weight: what is left of RMSNorm in a row's product once `rstd` is taken out."""
    norm = anchor.norm
    assert norm is not None
    if norm.weight is None:
        return x
    weight = f"{load(f'{anchor.names[norm.weight]}_ptr + {k}', (live,))}.to(tl.float32)"
    return f"{x} * ({norm.offset} + {weight})" if norm.offset else f"{x} * {weight}"


def normalised(anchor: Anchor, x: str, k: str, live: str | None) -> str:
    """A loaded float32 tile, normalised by `rstd` and `mean`; lanes outside of the row stay 0."""
    norm = anchor.norm
    assert norm is not None
    h = f"{x} * rstd" if norm.rms else f"({x} - mean) * rstd"
    h = scaled(anchor, h, k, live)
    if norm.bias is not None:
        h += f" + {load(f'{anchor.names[norm.bias]}_ptr + {k}', (live,))}.to(tl.float32)"
    return f"tl.where({live}, {h}, 0.0)" if live and not norm.rms else h
