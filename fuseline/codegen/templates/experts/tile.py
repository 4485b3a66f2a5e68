"""The grouped products: tiles of BLOCK_N output columns by BLOCK_M tokens of one group, on tensor cores.

    up      gathered tokens [H, BLOCK_M], gate and up rows [BLOCK_N, H] → the gated unit → act [S, I], sorted by group
    down    act [I, BLOCK_M], rows [BLOCK_N, I] → + bias, times the routing weight → parts [S, H], by token again

The experts' rows are the left operand: the instructions want 64 or more along that side, and a decode has few tokens.
Sums are float32. A tile reads its matrix once; tiles of one group follow each other, so a second one finds it in L2.

With few tokens a tile of packed pairs is *dual*, it holds tokens of both experts of a pair: its words are loaded once
and give both experts' operands, each of which meets all tokens; every token keeps the sums of its own.
"""

from __future__ import annotations

import torch

from ....compiler.formats.pairs import ALONE
from ...dtypes import triton_type
from ..text import Text, load
from . import words
from .coded import CodedRows
from .config import TileConfig
from .gate import gated
from .read import Experts, Matrices

SCALARS = ("tiles",)
CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")


def up_body(experts: Experts, tile: TileConfig, kind: str) -> str:
    """The body of the first kernel; grid: tiles · ceil(I / BLOCK_N).

    kind: "many" or, where the experts' bytes are the bound, "few"; "one" is one token, whose choices are the tiles.
    """
    text, tiles = Text(), _Tiles(experts, experts.gate_up, tile, kind)
    between, other = experts.gate_step
    with text.indented():
        tiles.start(text, experts.inner)
        text.add(f"x_columns = hidden_ptr + (choice // {experts.top}).to(tl.int64)[None, :] * {experts.hidden}")
        tiles.rows(text, "gate_up", "gate", f"n * {between}" if between > 1 else "n")
        tiles.rows(text, "gate_up", "up", f"n * {between} + {other}" if between > 1 else f"n + {other}")
        tiles.loop(text, ("gate", "up"))
        for name in ("gate", "up"):
            tiles.finish(text, name)
        if "gate_up_bias" in experts.tensors:
            for name, shift in (("gate", 0), ("up", other)):
                tiles.bias(text, "gate_up_bias", name, 2 * experts.inner, f"n * {between} + {shift}")
        gated(text, experts)
        _store(text, "act_ptr + place.to(tl.int64)[:, None]", experts.inner, tile, experts.dtype, "inner")
    return str(text)


def down_body(experts: Experts, tile: TileConfig, kind: str) -> str:
    """The body of the second kernel; grid: tiles · ceil(H / BLOCK_N)."""
    text, tiles = Text(), _Tiles(experts, experts.down, tile, kind)
    with text.indented():
        tiles.start(text, experts.hidden)
        text.add(f"x_columns = act_ptr + place.to(tl.int64)[None, :] * {experts.inner}")
        tiles.rows(text, "down", "down", "n")
        tiles.loop(text, ("down",))
        tiles.finish(text, "down")
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


class _Tiles:
    """What both products have in common: which tile, the loop over channels, and the sums of each token's expert."""

    def __init__(self, experts: Experts, matrices: Matrices, tile: TileConfig, kind: str):
        self.experts, self.matrices, self.tile, self.one = experts, matrices, tile, kind == "one"
        self.dual, self.words = kind == "few" and matrices.words, matrices.words
        self.inside_n: str | None = None
        self.coded: CodedRows | None = None
        if matrices.coded is not None:
            rows = experts.experts * matrices.height
            self.coded = CodedRows(matrices.name, matrices.coded, matrices.height, rows, experts.dtype, kind != "many")

    def start(self, text: Text, columns: int) -> None:
        """Defines place, choice [BLOCK_M] and n [BLOCK_N], or returns where the table has no such tile."""
        blocks = -(-columns // self.tile.block_n)
        text.add(
            "pid = tl.program_id(0)",
            f"first_tile = pid // (GROUP_M * {blocks}) * GROUP_M",
            "height = min(tiles - first_tile, GROUP_M)",
            f"tile = first_tile + pid % (GROUP_M * {blocks}) % height",
            f"block = pid % (GROUP_M * {blocks}) // height",
        )
        if self.one:
            text.add(
                "group = tl.load(indices_ptr + tile).to(tl.int32)",
                "place = tile + tl.arange(0, BLOCK_M)",
                "inside_m = place == tile",
                "choice = place",
            )
        else:
            self._look_up(text)
        text.add("n = block * BLOCK_N + tl.arange(0, BLOCK_N)")
        if columns % self.tile.block_n:
            self.inside_n = "inside_n"
            text.add(f"inside_n = n < {columns}")
        if self.words and not self.dual:
            words.masks(text, "slot")
            text.add("group = group // 2")
        if self.coded is not None:
            self.coded.constants(text)
        if self.dual:
            text.add(
                f"keep = tl.where(slot == {ALONE}, -1, {words.KEPT[0]})",
                f"scale = tl.where(slot == {ALONE}, 1.0, {words.SCALES[0]!r})",
            )

    def _look_up(self, text: Text) -> None:
        """The tile's group and places, by the table."""
        text.add(
            "count = tl.load(tiles_ptr)",
            "row = tiles_ptr + (tile + 1) * 4",
            "group = tl.load(row)",
            "place = tl.load(row + 1) + tl.arange(0, BLOCK_M)",
            "inside_m = place < tl.load(row + 2)",
            *(["slot = tl.load(row + 3)"] if self.words else []),
        )
        with text.block("if tile >= count:"):
            text.add("return")
        choice = load("order_ptr + place", ("inside_m",), "0")
        if self.dual:
            text.add(f"entry = {choice}", "choice = entry >> 1", "second = (entry & 1) == 1")
        else:
            text.add(f"choice = {choice}")

    def rows(self, text: Text, matrices: str, name: str, row: str) -> None:
        """Where the rows of one operand begin, [BLOCK_N, 1]."""
        for acc in self._sums(name):
            text.add(f"{acc} = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)")
        if self.coded is not None:
            self.coded.start(text, name, row, self.inside_n)
            return
        expert, step, _ = self.matrices.strides
        wide = ".to(tl.int64)" if self.matrices.height * self.matrices.width >= 2**31 else ""
        text.add(f"{name}_rows = {matrices}_ptr + group.to(tl.int64) * {expert} + (({row}){wide} * {step})[:, None]")

    def _sums(self, name: str) -> tuple[str, ...]:
        return (name, f"{name}_second") if self.dual else (name,)

    def loop(self, text: Text, names: tuple[str, ...]) -> None:
        if self.coded is not None:
            self.coded.loop(text, names, self.inside_n)
            return
        width, block = self.matrices.width, self.tile.block_k
        column_mask = self.inside_n and f"{self.inside_n}[:, None]"
        live = f"(k < {width})" if width % block else None
        dtype = triton_type(self.experts.dtype)
        with text.block(f"for k0 in range(0, {width}, BLOCK_K):"):
            text.add("k = k0 + tl.arange(0, BLOCK_K)")
            text.add(f"x = {load('x_columns + k[:, None]', ('inside_m[None, :]', live and f'{live}[:, None]'))}")
            if self.words:
                text.add("j = k0 // 2 + tl.arange(0, BLOCK_K // 2)")
                live = f"(j < {width // 2})[None, :]" if live else None
            for name in names:
                if self.words:
                    text.add(f"words_{name} = {load(f'{name}_rows + j[None, :]', (column_mask, live), '0')}")
                    self._pair(text, name)
                    continue
                at = f"k[None, :] * {step}" if (step := self.matrices.strides[2]) != 1 else "k[None, :]"
                mask = (column_mask, live and f"{live}[None, :]")
                text.add(f"w_{name} = {load(f'{name}_rows + {at}', mask)}.to({dtype})")
                self._dot(text, name, f"w_{name}")

    def _pair(self, text: Text, name: str) -> None:
        loaded, w = f"words_{name}", f"w_{name}"
        if not self.dual:
            words.tile(text, w, words.numbers(loaded), "BLOCK_K")
            self._dot(text, name, w)
            return
        second = f"({loaded} & {words.KEPT[1]}) | (({loaded} << 1) & {words.SIGN})"
        for acc, value in zip(self._sums(name), (f"{loaded} & keep", second), strict=True):
            words.tile(text, f"w_{acc}", value, "BLOCK_K")
            self._dot(text, acc, f"w_{acc}")

    def _dot(self, text: Text, acc: str, w: str) -> None:
        precision = ', input_precision="ieee"' if self.experts.dtype == torch.float32 else ""
        text.add(f"{acc} = tl.dot({w}, x, {acc}{precision})")

    def finish(self, text: Text, name: str) -> None:
        """The sums of each token's own expert."""
        if self.coded is not None:
            self.coded.finish(text, name, self.inside_n)
        elif self.dual:
            scaled = f"{name}_second * {words.SCALES[1]!r}"
            text.add(f"{name} = tl.where(second[None, :], {scaled}, {name} * scale)")
        elif self.words:
            text.add(f"{name} = {name} * scale")

    def bias(self, text: Text, tensor: str, name: str, width: int, column: str) -> None:
        """Adds each token's expert's bias: in a tile of words the experts of two tokens may differ."""
        if self.words:
            expert = load("indices_ptr + choice", ("inside_m",), "0")
            at = f"{tensor}_ptr + {expert}[None, :] * {width} + ({column})[:, None]"
            mask: tuple[str | None, ...] = ("inside_m[None, :]", self.inside_n and f"{self.inside_n}[:, None]")
        else:
            at, mask = (
                f"{tensor}_ptr + (group * {width} + {column})[:, None]",
                (self.inside_n and f"{self.inside_n}[:, None]",),
            )
        text.add(f"{name} += {load(at, mask)}.to(tl.float32)")


def _store(text: Text, rows: str, width: int, tile: TileConfig, dtype: torch.dtype, value: str) -> None:
    inside = "inside_m[:, None]" + (" & inside_n[None, :]" if width % tile.block_n else "")
    stored = f"tl.trans({value}).to({triton_type(dtype)})"
    text.add(f"tl.store({rows} * {width} + n[None, :], {stored}, mask={inside})")
