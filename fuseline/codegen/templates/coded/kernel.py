"""Products with coded weights on tensor cores: tiles of BLOCK_N output columns by BLOCK_M rows.

    part of a row's chunks → words, x → values of 128 channels → tl.dot → … → epilogue, or partial sums

Weights are the left operand, [columns, channels]·[channels, rows]: the instructions want 64 or more along that side,
and a decode has few rows. The result is transposed for the epilogue. One text serves every format (`values.py`), any
number of rows, and two ways to bring scales in:

after      products of a group's codes are summed, then scaled: nothing is rounded. For few rows, where a group's sums
           are fewer than its weights, and where all channels share a scale, which then comes last.
before     values are scaled and rounded to the product's type, as in the graph.

With few rows there are too few tiles to keep the memory busy, so SPLIT programs share a tile's channels, each writing
its partial sums, and a second kernel adds them in order and runs the epilogue: the same inputs give the same bits.
Kernels of few rows are compiled for the power of two ROWS that holds them, so that partial sums are stored whole. A
norm before the product is a kernel of its own (`norm.py`): made again for each tile, it would take the registers that
let four programs share a multiprocessor.

Codes and x are read stages ahead, scales and zero points a turn ahead: Triton copies no two bytes a thread by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ....compiler.formats.words import COLUMNS
from ...dependent import MARK
from ...dtypes import triton_type
from ..anchor import Anchor, Linear, Section
from ..epilogue import Epilogue
from ..signature import branches
from ..text import Text, joined, load
from .config import FEW_ROWS, Tile
from .scales import number
from .values import FP8, Values
from .weight import Coded


@dataclass(frozen=True)
class Product:
    """What a kernel of this template multiplies, and how. target: the type of both operands. few: of few rows."""

    anchor: Anchor
    target: torch.dtype
    tile: Tile
    few: bool = False

    @property
    def weight(self) -> Coded:
        """Any of the weights: they are of one format and width."""
        return self.anchor.linears[0].coded

    @property
    def apart(self) -> Product:
        """With a section for each linear: what stores sums need not have both halves of a gated unit at hand."""
        sections = tuple(replace(s, linears=(linear,)) for s in self.anchor.sections for linear in s.linears)
        return replace(self, anchor=replace(self.anchor, sections=sections))

    @property
    def total(self) -> int:
        """Columns of all linears together."""
        return sum(linear.n for linear in self.anchor.linears)

    @property
    def wide(self) -> str:
        """What makes numbers of partial sums' rows wide enough for addresses."""
        return ".to(tl.int64)" if self.tile.split * self.total * FEW_ROWS >= 2**31 else ""

    @cached_property
    def integers(self) -> bool:
        return self.target == torch.int8

    def values(self, linear: Linear) -> Values:
        return Values(linear.coded, self.target, packed=True)

    def scaled_after(self, linear: Linear) -> bool:
        """Whether each tl.dot has one scale a column, which multiplies its sums."""
        weight = linear.coded
        whole = weight.group % weight.step == 0
        return weight.groups > 1 and whole and (self.integers or self.tile.scale_after)


def product_body(product: Product) -> str:
    """The body of the kernel; grid: tiles of rows times tiles of columns, by `split`."""
    anchor, tile = product.anchor, product.tile
    text = Text()
    blocks = " + ".join(f"tl.cdiv({section.n}, BLOCK_N)" for section in anchor.sections)
    with text.indented():
        text.add(
            f"blocks = {blocks}",
            "pid = tl.program_id(0)",
            f"pids_in_group = {tile.group_m} * blocks",
            f"first_m = pid // pids_in_group * {tile.group_m}",
            f"height = min(tl.cdiv(M, BLOCK_M) - first_m, {tile.group_m})",
            "m = (first_m + pid % pids_in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)",
            "block = pid % pids_in_group // height",
        )
        if tile.split > 1:
            text.add("split = tl.program_id(1)")
        text.add(*product.values(anchor.linears[0]).constants("M < 0"))
        rows, row = ("(1 if ROWS == 1 else M)", "m") if product.few else ("M", "m.to(tl.int64)")
        text.add(f"inside_m = (m < {rows})[:, None]", f"x_rows = x_ptr + {row}[:, None] * {anchor.k}")
        text.add("x_columns = tl.trans(x_rows)", "inside_rows = tl.trans(inside_m)")
        for section, tag, head, first in branches(anchor, apart=True):
            with text.block(head):
                _Section(product, section, tag, first).write(text)
    return str(text)


class _Section:
    """One section's loop, and what follows it."""

    def __init__(self, product: Product, section: Section, tag: str, first: str):
        self.product, self.section, self.tag, self.first = product, section, tag, first
        self.anchor, self.weight = product.anchor, product.weight
        self.n = f"n{tag}"
        self.inside = f"inside_n{tag}" if section.n % product.tile.block_n else None

    def write(self, text: Text) -> None:
        product, tag, weight, tile = self.product, self.tag, self.weight, self.product.tile
        text.add(f"{self.n} = {self.first} * BLOCK_N + tl.arange(0, BLOCK_N)")
        if self.inside:
            text.add(f"{self.inside} = {self.n} < {self.section.n}")
        for linear in self.section.linears:
            self._start(text, linear)
        turns = weight.chunks // tile.split
        start = f"split * {turns}" if tile.split > 1 else ""
        if weight.groups > 1:
            self._fetch(text, start or "0")
        with text.block(f"for turn{tag} in range({turns}):"):
            text.add(f"chunk{tag} = " + (f"{start} + turn{tag}" if start else f"turn{tag}"))
            self._turn(text)
        if product.few:
            text.add(MARK)
        if tile.split > 1:
            self._store_parts(text)
            return
        finish(product, self.section, tag, self.n, self.inside, text)

    def _start(self, text: Text, linear: Linear) -> None:
        name = self.anchor.names[linear.node]
        kind = "tl.int32" if self.product.integers and not self.product.scaled_after(linear) else "tl.float32"
        text.add(f"acc_{name} = tl.zeros((BLOCK_N, BLOCK_M), {kind})")
        weight = linear.coded
        n = f"{self.n}.to(tl.int64)" if (linear.n + COLUMNS) * weight.row >= 2**31 else self.n
        text.add(f"row_{name} = {self.anchor.names[weight.tensor]}_ptr + ({weight.start(self.n, n)})[:, None]")
        if weight.zero is not None and weight.groups == 1:
            loaded = load(f"{self.anchor.names[weight.zero]}_ptr + {self.n}", self._inside_groups, "0")
            text.add(f"zero_{name} = {self.product.values(linear).subtrahend(loaded)}")

    def _turn(self, text: Text) -> None:
        weight, tag = self.weight, self.tag
        if weight.words is None:
            text.add(f"k = chunk{tag} * {weight.chunk} + tl.arange(0, {weight.chunk})")
        row_mask = self.inside and f"{self.inside}[:, None]"
        tail = f"(k < {weight.k})[None, :]" if weight.words is None and weight.k % weight.chunk else None
        masks = joined((row_mask, tail))
        masks += ", other=0" if masks else ""
        for linear in self.section.linears:
            name = self.anchor.names[linear.node]
            text.add(*self.product.values(linear).loads(name, f"row_{name}", f"chunk{tag}", masks))
        dots = weight.chunk // weight.step
        for dot in range(dots):
            self._x(text, dot)
            if weight.groups > 1:
                self._scales(text, dot)
                if dot == dots - 1:  # no earlier: registers for both turns' would keep programs from the multiprocessor
                    self._fetch(text, f"tl.minimum(chunk{tag} + 1, {weight.chunks - 1})")
            for linear in self.section.linears:
                self._accumulate(text, linear, dot)

    def _x(self, text: Text, dot: int) -> None:
        """Loads x for one tl.dot, [step, BLOCK_M]."""
        weight, anchor, tag = self.weight, self.anchor, self.tag
        k, x = f"k{tag}_{dot}", f"x{tag}"
        text.add(f"{k} = ({self._start_of(f'chunk{tag}', dot)} + tl.arange(0, {weight.step}))[:, None]")
        live = f"({k} < {weight.k})" if weight.k % weight.chunk else None
        target, integral = triton_type_of(self.product.target), anchor.activation is not None
        text.add(f"{x} = {load(f'x_columns + {k}', ('inside_rows', live), '0' if integral else '0.0')}")
        if self.product.target == FP8:
            text.add(f"{x} = {x}.to({target}, bitcast=True)")
        elif not integral:
            text.add(f"{x} = {x}.to({target})")

    def _accumulate(self, text: Text, linear: Linear, dot: int) -> None:
        product, name, weight = self.product, self.anchor.names[linear.node], linear.coded
        after, scale, zero = product.scaled_after(linear), None, None
        if weight.groups > 1:
            scale = f"scale_{name}"
        if weight.zero is not None:
            zero = f"zero_{name}"
        product.values(linear).write(text, name, dot, None if after else scale, zero)
        precision = ', input_precision="ieee"' if product.target == torch.float32 else ""
        kind = ", out_dtype=tl.int32" if product.integers else ""
        if product.target == FP8:  # the sums of tensor cores alone have 14 bits
            kind = f", max_num_imprecise_acc={weight.step}"
        if not after:
            text.add(f"acc_{name} = tl.dot(w_{name}, x{self.tag}, acc_{name}{precision}{kind})")
            return
        part = f"tl.dot(w_{name}, x{self.tag}{precision}{kind})"
        if product.integers:
            text.add(f"part_{name} = {part} + 0x4B400000  # 1.5·2^23 and the sum, below 2^22")
            part = f"(part_{name}.to(tl.float32, bitcast=True) - 12582912.0)"
        text.add(f"acc_{name} += {part} * scale_{name}[:, None]")

    def _start_of(self, chunk: str, dot: int) -> str:
        """The first channel of a dot."""
        start = f"{chunk} * {self.weight.chunk}"
        return f"{start} + {dot * self.weight.step}" if dot else start

    def _scales(self, text: Text, dot: int) -> None:
        """The scales and zero points of a dot, from what was loaded for it."""
        for linear in self.section.linears:
            weight, name = linear.coded, self.anchor.names[linear.node]
            scale = f"scale_{name}"
            text.add(f"{scale} = {number(text, scale, f'scale{dot}_{name}', weight.scaling)}")
            if weight.zero is not None:
                text.add(f"zero_{name} = {self.product.values(linear).subtrahend(f'zero{dot}_{name}')}")

    def _fetch(self, text: Text, chunk: str) -> None:
        """Loads a chunk's scales and zero points as they are stored: `scale<dot>_<linear>`, `zero<dot>_<linear>`.

        Each is [BLOCK_N] or, where a dot's pieces have their own, [BLOCK_N, pieces].
        """
        names, tag = self.anchor.names, self.tag
        text.add(f"ahead{tag} = {chunk}")
        for dot in range(self.weight.chunk // self.weight.step):
            self._groups(text, f"ahead{tag}", dot)
            for linear in self.section.linears:
                for part, tensor in (("scale", linear.coded.scale), ("zero", linear.coded.zero)):
                    if tensor is not None:
                        loaded = load(f"{names[tensor]}_ptr + at{tag}", self._inside_groups, "0")
                        text.add(f"{part}{dot}_{names[linear.node]} = {loaded}")

    def _groups(self, text: Text, chunk: str, dot: int) -> None:
        """Defines at<tag>, where the scales of a dot lie: of each column, [BLOCK_N], or of each of its pieces."""
        weight, n = self.weight, self.n
        text.add(f"group{self.tag} = {weight.group_at(self._start_of(chunk, dot))}")
        row, column = (f"group{self.tag}[None, :]", f"{n}[:, None]") if weight.several else (f"group{self.tag}", n)
        text.add(f"at{self.tag} = {row} * {self.section.n} + {column}")

    @property
    def _inside_groups(self) -> tuple[str | None]:
        return (self.inside and (f"{self.inside}[:, None]" if self.weight.several else self.inside),)

    def _store_parts(self, text: Text) -> None:
        product = self.product
        conditions = (self.inside and f"{self.inside}[:, None]", "(m < ROWS)[None, :]")
        for linear in self.section.linears:
            name = self.anchor.names[linear.node]
            first = offset(product, linear)
            column = f"split * {product.total} + {f'{first} + ' if first else ''}{self.n}"
            at = f"(({column}){self.product.wide} * ROWS)[:, None]"
            acc = f"acc_{name}.to(tl.float32)" if product.integers else f"acc_{name}"
            text.add(f"tl.store(parts_ptr + {at} + m[None, :], {acc}{joined(conditions)})")


def offset(product: Product, linear: Linear) -> int:
    """The first of a linear's columns among those of all."""
    linears = product.anchor.linears
    return sum(other.n for other in linears[: linears.index(linear)])


def finish(
    product: Product, section: Section, tag: str, n: str, inside: str | None, text: Text, summed: bool = False
) -> None:
    """Scales that come last, and the epilogue: acc_<linear> [columns, rows] → the outputs.

    summed: the sums are float32 whatever was multiplied.
    """
    anchor, results = product.anchor, {}
    if anchor.activation is not None:
        text.add(f"x_scale{tag} = {load('x_scale_ptr + m', ('m < M',))}.to(tl.float32)")
    for linear in section.linears:
        weight, name, values = linear.coded, anchor.names[linear.node], product.values(linear)
        factors = [f"acc_{name}" + (".to(tl.float32)" if product.integers and not summed else "")]
        if weight.groups == 1:
            at = f"{anchor.names[weight.scale]}_ptr + {n}"
            loaded = load(at, (inside,), "0")
            scale = number(text, f"scale_{name}", loaded, weight.scaling)
            text.add(f"scale_{name} = {scale}")
            factors.append(f"scale_{name}[:, None]")
        if weight.outer is not None:
            factors.append(f"tl.load({anchor.names[weight.outer]}_ptr).to(tl.float32)")
        if values.factor != 1:
            factors.append(repr(values.factor))
        if anchor.activation is not None:
            factors.append(f"x_scale{tag}[None, :]")
        results[linear] = f"tl.trans({' * '.join(factors)})"
    Epilogue(anchor, section, columns=n, inside=inside, rows="m", tile=True, tag=tag).write(text, results)


def sum_body(product: Product) -> str:
    """The body of the kernel that adds partial sums; grid: tiles of rows times tiles of columns."""
    anchor, split = product.anchor, product.tile.split
    text = Text()
    blocks = " + ".join(f"tl.cdiv({section.n}, BLOCK_N)" for section in anchor.sections)
    with text.indented():
        text.add(
            f"blocks = {blocks}",
            "block = tl.program_id(0) % blocks",
            "m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)",
            "inside_m = (m < M)[:, None]",
        )
        for section, tag, head, first in branches(anchor):
            with text.block(head):
                n = f"n{tag}"
                text.add(f"{n} = {first} * BLOCK_N + tl.arange(0, BLOCK_N)", f"inside_n{tag} = {n} < {section.n}")
                for linear in section.linears:
                    acc = f"acc_{anchor.names[linear.node]}"
                    text.add(f"{acc} = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)")
                    with text.block(f"for part in tl.static_range({split}):"):
                        first_n = offset(product, linear)
                        column = f"part * {product.total} + {f'{first_n} + ' if first_n else ''}{n}"
                        mask = f"inside_n{tag}[:, None] & (m < ROWS)[None, :]"
                        text.add(f"row = parts_ptr + (({column}){product.wide} * ROWS)[:, None]")
                        text.add(f"{acc} += tl.load(row + m[None, :], mask={mask}, other=0.0)")
                finish(product, section, tag, n, f"inside_n{tag}", text, summed=True)
    return str(text)


def triton_type_of(dtype: torch.dtype) -> str:
    return "tl.float8e4nv" if dtype == FP8 else triton_type(dtype)
