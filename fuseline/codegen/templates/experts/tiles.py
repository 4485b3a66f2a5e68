"""What both grouped products have in common: which tile, the loop over channels, the sums of each token's expert."""

from __future__ import annotations

import torch

from ....compiler.formats.pairs import ALONE
from ...dtypes import triton_type
from ..text import Text, load
from . import words
from .coded import CodedRows
from .config import TileConfig
from .read import Experts, Matrices


class Tiles:
    """The text of one product; kind: "one", "few" or "many", as in `tile.py`."""

    def __init__(self, experts: Experts, matrices: Matrices, tile: TileConfig, kind: str):
        self.experts, self.matrices, self.tile, self.one = experts, matrices, tile, kind == "one"
        self.words, self.dual = matrices.words, kind == "few" and experts.pairs
        self.inside_n: str | None = None
        self.coded: CodedRows | None = None
        if matrices.coded is not None:
            count, after = experts.keys, kind != "many"
            self.coded = CodedRows(
                matrices.name, matrices.coded, matrices.height, count, experts.dtype, after, self.dual
            )

    def start(self, text: Text, columns: int) -> None:
        """Defines place, choice [BLOCK_M] and n [BLOCK_N], or returns where the table has no such tile."""
        self.place(text, columns)
        if self.coded is not None:
            self.coded.constants(text)

    def place(self, text: Text, columns: int) -> None:
        """The same, without what decodes words."""
        blocks = -(-columns // self.tile.block_n)
        text.add(
            "pid = tl.program_id(0)",
            f"first_tile = pid // (GROUP_M * {blocks}) * GROUP_M",
            "height = min(tiles - first_tile, GROUP_M)",
            f"tile = first_tile + pid % (GROUP_M * {blocks}) % height",
            f"block = pid % (GROUP_M * {blocks}) // height",
        )
        if self.one:
            text.add("group = tl.load(indices_ptr + tile).to(tl.int32)")
            if self.experts.pairs:
                text.add("slot = tl.load(slots_ptr + group)", "group = tl.load(rows_ptr + group)")
            text.add(
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
        if self.experts.pairs and not self.dual and not self.one:
            text.add("group = group // 2")

    def _look_up(self, text: Text) -> None:
        """The tile's group and places, by the table."""
        text.add(
            "count = tl.load(tiles_ptr)",
            "row = tiles_ptr + (tile + 1) * 4",
            "group = tl.load(row)",
            "place = tl.load(row + 1) + tl.arange(0, BLOCK_M)",
            "inside_m = place < tl.load(row + 2)",
            *(["slot = tl.load(row + 3)"] if self.words or (self.experts.pairs and not self.dual) else []),
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
        elif not self.words:
            self._loop(text, names)
        else:  # a loop for each way to read words: see `words.py`
            both = ((f"slot != {ALONE}", (0, 1)),)
            each = (("slot == 0", (0,)), ("slot == 1", (1,)))
            for condition, slots in ((f"slot == {ALONE}", (ALONE,)), *(both if self.dual else each)):
                with text.block(f"if {condition}:"):
                    self._loop(text, names, slots)

    def _loop(self, text: Text, names: tuple[str, ...], slots: tuple[int, ...] = ()) -> None:
        """slots: whose numbers the words are read as."""
        width, block = self.matrices.width, self.tile.block_k
        column_mask = self.inside_n and f"{self.inside_n}[:, None]"
        live = f"(k < {width})" if width % block else None
        dtype = triton_type(self.experts.dtype)
        with text.block(f"for k0 in range(0, {width}, BLOCK_K):"):
            text.add("k = k0 + tl.arange(0, BLOCK_K)")
            text.add(f"x = {load('x_columns + k[:, None]', ('inside_m[None, :]', live and f'{live}[:, None]'))}")
            for name in names:
                at = f"k[None, :] * {step}" if (step := self.matrices.strides[2]) != 1 else "k[None, :]"
                mask = (column_mask, live and f"{live}[None, :]")
                if not slots:
                    text.add(f"w_{name} = {load(f'{name}_rows + {at}', mask)}.to({dtype})")
                    self._dot(text, name, f"w_{name}")
                    continue
                text.add(f"words_{name} = {load(f'{name}_rows + {at}', mask, '0')}")
                for acc, slot in zip(self._sums(name), slots, strict=False):
                    words.tile(text, f"w_{acc}", f"words_{name}", slot)
                    self._dot(text, acc, f"w_{acc}")

    def _dot(self, text: Text, acc: str, w: str) -> None:
        text.add(f"{acc} = tl.dot({w}, x, {acc}{self.precision})")

    @property
    def precision(self) -> str:
        """The tail of a `tl.dot`: float32 is multiplied as IEEE says."""
        return ', input_precision="ieee"' if self.experts.dtype == torch.float32 else ""

    def finish(self, text: Text, name: str) -> None:
        """The sums of each token's own expert."""
        if self.coded is not None:
            self.coded.finish(text, name, self.inside_n)
            if self.dual:
                text.add(f"{name} = tl.where(second[None, :], {name}_second, {name})")
        elif self.dual:
            first, second, alone = words.SCALES
            own = f"{name} * tl.where(slot == {ALONE}, {alone!r}, {first!r})"
            text.add(f"{name} = tl.where(second[None, :], {name}_second * {second!r}, {own})")
        elif self.words:
            text.add(f"{name} = {name} * {words.scale('slot')}")

    def bias(self, text: Text, tensor: str, name: str, width: int, column: str) -> None:
        """Adds each token's expert's bias: in a tile of pairs the experts of two tokens may differ."""
        if self.experts.pairs:
            expert = load("indices_ptr + choice", ("inside_m",), "0")
            at = f"{tensor}_ptr + {expert}[None, :] * {width} + ({column})[:, None]"
            mask: tuple[str | None, ...] = ("inside_m[None, :]", self.inside_n and f"{self.inside_n}[:, None]")
        else:
            at, mask = (
                f"{tensor}_ptr + (group * {width} + {column})[:, None]",
                (self.inside_n and f"{self.inside_n}[:, None]",),
            )
        text.add(f"{name} += {load(at, mask)}.to(tl.float32)")
