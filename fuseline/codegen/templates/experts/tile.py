"""The grouped products: tiles of BLOCK_N output columns by BLOCK_M tokens of one group, on tensor cores.

    up      gathered tokens [H, BLOCK_M], gate and up rows [BLOCK_N, H] → the gated unit → act [S, I], sorted by group
    down    act [I, BLOCK_M], rows [BLOCK_N, I] → + bias, times the routing weight → parts [S, H], by token again

The experts' rows are the left operand: the instructions want 64 or more along that side, and a decode has few tokens.
Sums are float32. A tile reads its matrix once; tiles of one group follow each other, so a second one finds it in L2.

With few tokens a tile of packed pairs is *dual*, it holds tokens of both experts of a pair: its words are loaded once
and give both experts' operands, each of which meets all tokens; every token keeps the sums of its own (`tiles.py`).
"""

from __future__ import annotations

import torch

from ...dtypes import triton_type
from ..text import Text, load
from .config import TileConfig
from .gate import gated
from .lowrank import add_low
from .read import Experts
from .tiles import Tiles

SCALARS = ("tiles",)
CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")


def up_body(experts: Experts, tile: TileConfig, kind: str) -> str:
    """The body of the first kernel; grid: tiles · ceil(I / BLOCK_N).

    kind: "many" or, where the experts' bytes are the bound, "few"; "one" is one token, whose choices are the tiles.
    """
    text, tiles = Text(), Tiles(experts, experts.gate_up, tile, kind)
    between, other = experts.gate_step
    with text.indented():
        tiles.start(text, experts.inner)
        text.add(f"x_columns = hidden_ptr + (choice // {experts.top}).to(tl.int64)[None, :] * {experts.hidden}")
        first = f"n * {between}" if between > 1 else "n"
        rows = {"gate": first, "up": f"{first} + {other}"}
        for name, row in rows.items():
            tiles.rows(text, "gate_up", name, row)
        tiles.loop(text, ("gate", "up"))
        for name in rows:
            tiles.finish(text, name)
        add_low(text, tiles, rows)
        if "gate_up_bias" in experts.tensors:
            for name, shift in (("gate", 0), ("up", other)):
                tiles.bias(text, "gate_up_bias", name, 2 * experts.inner, f"n * {between} + {shift}")
        gated(text, experts)
        _store(text, "act_ptr + place.to(tl.int64)[:, None]", experts.inner, tile, experts.dtype, "inner")
    return str(text)


def down_body(experts: Experts, tile: TileConfig, kind: str) -> str:
    """The body of the second kernel; grid: tiles · ceil(H / BLOCK_N)."""
    text, tiles = Text(), Tiles(experts, experts.down, tile, kind)
    with text.indented():
        tiles.start(text, experts.hidden)
        text.add(f"x_columns = act_ptr + place.to(tl.int64)[None, :] * {experts.inner}")
        tiles.rows(text, "down", "down", "n")
        tiles.loop(text, ("down",))
        tiles.finish(text, "down")
        add_low(text, tiles, {"down": "n"})
        if "down_bias" in experts.tensors:
            tiles.bias(text, "down_bias", "down", experts.hidden, "n")
        weight = load("weights_ptr + choice", ("inside_m",))
        text.add(f"down = down * {weight}.to(tl.float32)[None, :]")
        _store(text, "parts_ptr + choice.to(tl.int64)[:, None]", experts.hidden, tile, experts.dtype, "down")
    return str(text)


def sum_body(experts: Experts) -> str:
    """The body of the kernel that adds a token's K products, in order; grid: (T, ceil(H / BLOCK_N))."""
    text, width = Text(), experts.hidden
    with text.indented():
        text.add(
            "token = tl.program_id(0).to(tl.int64)",
            "n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
            "total = tl.zeros((BLOCK_N,), tl.float32)",
        )
        with text.block(f"for k in tl.static_range({experts.top}):"):
            at = f"parts_ptr + (token * {experts.top} + k) * {width} + n"
            text.add(f"total += {load(at, (f'n < {width}',))}.to(tl.float32)")
        text.add(f"tl.store(out_ptr + token * {width} + n, total.to({triton_type(experts.dtype)}), mask=n < {width})")
    return str(text)


def _store(text: Text, rows: str, width: int, tile: TileConfig, dtype: torch.dtype, value: str) -> None:
    inside = "inside_m[:, None]" + (" & inside_n[None, :]" if width % tile.block_n else "")
    stored = f"tl.trans({value}).to({triton_type(dtype)})"
    text.add(f"tl.store({rows} * {width} + n[None, :], {stored}, mask={inside})")
