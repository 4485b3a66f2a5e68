"""Low ranks that make up for what codes lose (MiLo): two small products beside each of a layer's.

    low    [S, most]    down_e·x for each choice, by a kernel of its own, times both factors' scales
    sums   += up_eᵀ·low, in the kernel of the codes, when they are done

Experts have ranks of their own: rows of a factor lie below each other, starts [E + 1] says where each expert's begin,
and programs and turns of loops beyond an expert's rank end at once. Factors are numbers, or int8 codes with one scale a
row, which is one a rank: both scales go into `low`, and codes are multiplied as they are.
"""

from __future__ import annotations

from ...dtypes import triton_type
from ..text import Text, joined, load
from .config import TileConfig
from .read import RANKS, Experts, LowRank, Matrices
from .tiles import Tiles


def low_body(experts: Experts, matrices: Matrices, tile: TileConfig, kind: str) -> str:
    """The body of the kernel that writes `low`; grid: tiles · ceil(most / RANKS)."""
    low, width, table = _low(matrices), matrices.width, matrices.name
    text, tiles = Text(), Tiles(experts, matrices, tile, kind)
    dtype = triton_type(experts.dtype)
    x = "hidden_ptr" if table == "gate_up" else "act_ptr"
    at = f"(choice // {experts.top})" if table == "gate_up" else "place"
    with text.indented():
        tiles.place(text, low.most)
        _first(text, table)
        with text.block("if block * BLOCK_N >= rank:"):
            text.add("return")
        text.add(
            "ranks = n < rank",
            f"x_columns = {x} + {at}.to(tl.int64)[None, :] * {width}",
            f"low_down_rows = {table}_low_down_ptr + (first + n).to(tl.int64)[:, None] * {width}",
            "low = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)",
        )
        live = f"(k < {width})" if width % tile.block_k else None
        with text.block(f"for k0 in range(0, {width}, BLOCK_K):"):
            w = load("low_down_rows + k[None, :]", ("ranks[:, None]", live and f"{live}[None, :]"), "0")
            text.add(
                "k = k0 + tl.arange(0, BLOCK_K)",
                f"x = {load('x_columns + k[:, None]', ('inside_m[None, :]', live and f'{live}[:, None]'))}",
                f"w = {_as(w, low, 'down', dtype)}",
                f"low = tl.dot(w, x, low{tiles.precision})",
            )
        for part in ("down", "up"):
            if low.scales[part] is not None:
                scale = load(f"{table}_low_{part}_scale_ptr + first + n", ("ranks",))
                text.add(f"low = low * {scale}.to(tl.float32)[:, None]")
        row = f"low_ptr + place.to(tl.int64)[:, None] * {low.most} + n[None, :]"
        text.add(f"tl.store({row}, tl.trans(low).to({dtype}), mask=inside_m[:, None] & ranks[None, :])")
    return str(text)


def add_low(text: Text, tiles: Tiles, rows: dict[str, str]) -> None:
    """Adds what `low` makes of each operand's rows to its sums; rows: operand → its rows' numbers, as text."""
    matrices = tiles.matrices
    if matrices.low is None:
        return
    low, table, dtype = matrices.low, matrices.name, triton_type(tiles.experts.dtype)
    wide = ".to(tl.int64)" if sum(low.ranks) * matrices.height >= 2**31 else ""
    _first(text, table)
    text.add(f"low_rows = low_ptr + place.to(tl.int64)[None, :] * {low.most}")
    with text.block(f"for r0 in range(0, rank, {RANKS}):"):
        text.add(
            f"r = r0 + tl.arange(0, {RANKS})",
            f"low = {load('low_rows + r[:, None]', ('inside_m[None, :]', '(r < rank)[:, None]'))}",
            f"low_up_rows = {table}_low_up_ptr + ((first + r){wide} * {matrices.height})[None, :]",
        )
        for name, row in rows.items():
            masks = joined(("(r < rank)[None, :]", tiles.inside_n and f"{tiles.inside_n}[:, None]"))
            loaded = f"tl.load(low_up_rows + ({row})[:, None]{masks}, other=0)"
            text.add(f"w_{name} = {_as(loaded, low, 'up', dtype)}")
            text.add(f"{name} = tl.dot(w_{name}, low, {name}{tiles.precision})")


def _first(text: Text, table: str) -> None:
    """Defines an expert's first row and its rank."""
    text.add(f"first = tl.load({table}_starts_ptr + group)", f"rank = tl.load({table}_starts_ptr + group + 1) - first")


def _as(loaded: str, low: LowRank, part: str, dtype: str) -> str:
    """A factor in the products' type; codes are small whole numbers."""
    return f"{loaded}{'.to(tl.float32)' if low.scales[part] is not None else ''}.to({dtype})"


def _low(matrices: Matrices) -> LowRank:
    assert matrices.low is not None
    return matrices.low
