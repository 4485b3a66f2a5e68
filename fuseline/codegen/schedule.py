"""How a kernel's tile lies over its domain, and how much of it one program takes.

A domain is a shape; its last dimension is the row, the others are counted by `row`. Without reductions a program takes
a block of a few rows by some columns. With them it takes whole rows: in one block where they are of a known length of
at most 16384, otherwise in a loop over blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from .ahead import ahead
from .indexing import INT32, unflatten
from .sizes import Size, product, same
from .tile import Tile
from .values import ROW, Index, Mask, Range, Term

ELEMENTS = 1024  # of one program without reductions: eight a thread at four warps
ROW_ELEMENTS = 2048  # of one program with reductions, where rows are shorter than that
LOOP_BLOCK = 2048


@dataclass(frozen=True)
class Domain:
    """The shape that a kernel runs over: `lead` counts rows, `length` the columns of each."""

    lead: tuple[Size, ...]
    length: Size

    @property
    def shape(self) -> tuple[Size, ...]:
        return (*self.lead, self.length)

    @property
    def rows(self) -> Size:
        return product(self.lead)


@dataclass(frozen=True)
class Launch:
    """Host texts of the constants and the grid, in the order in which the host must compute them."""

    constants: dict[str, str]
    samples: dict[str, int]
    grid: str
    num_warps: int


class Schedule:
    """Opens a tile: writes the program's rows and columns, and later decides the blocks."""

    def __init__(
        self,
        tile: Tile,
        domain: Domain,
        reduces: bool,
        in_registers: bool = False,
        part: tuple[int, int] | None = None,
    ):
        """in_registers: rows of a known length are held in one block, however long they are. part: a program takes one
        row, whose length is known, as tiles of this shape."""
        self.tile, self.domain, self.reduces = tile, domain, reduces
        self.whole_rows = reduces or _one_block(domain.length)
        lines = tile.scopes[0].lines
        rows = domain.rows
        self.rows = "rows" if not isinstance(rows, int) else str(rows)
        if not isinstance(rows, int):
            tile.signature["rows"], tile.arguments["rows"] = "i32", "rows"
        tile.names.taken |= {"rows", "row", "rows_inside"}
        lines.append("pid = tl.program_id(0)")
        if part is not None:
            self.columns = tile.add_range("column", domain.length, block=1, looped=False)
            self._open_parts(lines, *part)
        elif reduces:
            known = in_registers and isinstance(domain.length, int)
            self.columns = tile.add_range("column", domain.length, looped=False if known else None)
        else:
            self.columns = tile.add_range("column", domain.length, block=1, looped=False)
            self._open_columns(lines)
        block = "pid" if self.whole_rows else "row_block"
        wide = f".to({self.rows}.dtype)" if self.rows == "rows" else ".to(tl.int64)" if rows >= INT32 else ""
        lines.append(f"row = {block}{wide} * ROWS + tl.arange(0, ROWS)[:, None]")
        row = Term("row", frozenset({ROW}), tuple(zip(self._lead_terms(rows), domain.lead, strict=True)))
        self.row_mask: Mask = ()
        if not same(rows, 1) and part is None:  # one row a program: it exists
            lines.append(f"row_inside = row < {self.rows}")
            self.row_mask = (Term("row_inside", frozenset({ROW})),)
        self.row = row

    def _lead_terms(self, rows: Size) -> Index:
        return unflatten(self.tile, Term("row", frozenset({ROW})), self.domain.lead)

    def _open_columns(self, lines: list[str]) -> None:
        columns, length = self.columns, self.domain.length
        if self.whole_rows:
            lines.append(f"{columns.index.text} = tl.arange(0, BLOCK)[None, :]")
        else:
            self.tile.names.taken |= {"row_block", "column_blocks"}
            wide = "" if isinstance(length, int) and length < INT32 else ".to(tl.int64)"
            lines += [
                f"column_blocks = tl.cdiv({columns.size_text}, BLOCK)",
                "row_block = pid // column_blocks",
                f"{columns.index.text} = (pid % column_blocks){wide} * BLOCK + tl.arange(0, BLOCK)[None, :]",
            ]
        if isinstance(length, int) and length and length % _block(length) == 0:
            columns.inside = None
        else:
            assert columns.inside is not None
            lines.append(f"{columns.inside.text} = {columns.index.text} < {columns.size_text}")

    def _open_parts(self, lines: list[str], height: int, width: int) -> None:
        columns, size = self.columns, height * width
        assert isinstance(columns.size, int) and columns.size % width == 0
        parts: list[tuple[Term, Term | None]] = []
        for start in range(0, columns.size, size):
            index, inside = Term(self.tile.names.new("column"), columns.index.axes), None
            shift = f"{start} + " if start else ""
            lines.append(
                f"{index.text} = {shift}tl.arange(0, {height})[:, None] * {width} + tl.arange(0, {width})[None, :]"
            )
            if start + size > columns.size:
                inside = Term(self.tile.names.new("column_inside"), columns.index.axes)
                left = (columns.size - start) // width
                lines.append(f"{inside.text} = tl.arange(0, {height})[:, None] < {left}")
            parts.append((index, inside))
        columns.parts, columns.part = tuple(parts), (height, width)

    @property
    def tiles(self) -> list[tuple[Index, Mask]]:
        """The domain's index that a tile's elements have, and where it lies inside: one tile, or a row's parts."""
        lead = tuple(term for term, _ in self.row.parts)
        parts = self.columns.parts or ((self.columns.index, self.columns.inside),)
        return [((*lead, index), self.row_mask + ((inside,) if inside is not None else ())) for index, inside in parts]

    def launch(self) -> Launch:
        """Decides the blocks, once all ranges are known. Host texts may use `rows` and `n` when these are symbolic."""
        constants: dict[str, str] = {}
        samples: dict[str, int] = {}
        used: list[Range] = self.tile.ranges
        for columns in used:
            length = columns.size
            if columns.parts:
                continue
            if isinstance(length, int):
                whole = min(_power(length), LOOP_BLOCK) if columns.looped else _power(length)
                block = whole if self.reduces else _block(length)
                constants[columns.block], samples[columns.block] = str(block), block
            else:
                limit = LOOP_BLOCK if self.reduces else ELEMENTS
                text = self.tile.arguments[columns.size_text]
                text = "n" if columns is self.columns else text
                constants[columns.block] = f"min({limit}, triton.next_power_of_2(max({text}, 1)))"
                samples[columns.block] = limit
        widest = max(samples.values(), default=1)
        looped = any(columns.looped for columns in used)
        most = max(1, (ROW_ELEMENTS if self.reduces else ELEMENTS) // widest) if not looped else 1
        rows, least, asked = self.domain.rows, 1, self.tile.blocks
        if asked is not None:
            most, least = asked.rows, asked.least_rows
        symbolic_block = not isinstance(self.columns.size, int) and not self.reduces
        if symbolic_block:
            height = f"triton.next_power_of_2(max({self.rows}, 1))"
            constants["ROWS"], samples["ROWS"] = f"min({ELEMENTS} // BLOCK, {height})", 1
        elif isinstance(rows, int) or most == 1:
            samples["ROWS"] = max(least, min(most, _power(rows))) if isinstance(rows, int) else most
            constants["ROWS"] = str(samples["ROWS"])
        else:
            text = f"min({most}, triton.next_power_of_2(max(rows, {least})))"
            constants["ROWS"], samples["ROWS"] = text, most
        elements = widest * samples["ROWS"]
        warps = 8 if looped or elements > ROW_ELEMENTS else 4
        warps = 16 if elements > 8192 else warps
        if asked is None:
            return Launch(constants, samples, self._grid(constants), warps)
        self._walk(asked.ahead)
        return Launch(constants, samples, f"min({asked.programs}, {self._grid(constants)})", asked.warps)

    def _walk(self, read_ahead: bool) -> None:
        """Has each program take one block of rows after the other."""
        lines = self.tile.scopes[0].lines
        first, *body = lines
        before, body = ahead(body, self.tile.taken - 1, self.rows) if read_ahead else ([], body)
        head = [*self.tile.prelude.lines, *before, first, f"while pid < tl.cdiv({self.rows}, ROWS):"]
        lines[:] = [*head, *("    " + line for line in body), "    pid += tl.num_programs(0)"]

    def _grid(self, constants: dict[str, str]) -> str:
        height = "ROWS" if not constants["ROWS"].isdigit() else constants["ROWS"]
        blocks = self.rows if height == "1" else f"triton.cdiv({self.rows}, {height})"
        if self.whole_rows:
            return blocks
        width = "BLOCK" if not constants["BLOCK"].isdigit() else constants["BLOCK"]
        length = str(self.domain.length) if isinstance(self.domain.length, int) else "n"
        return f"{blocks} * triton.cdiv({length}, {width})"


def _one_block(length: Size) -> bool:
    return isinstance(length, int) and length <= _block(length)


def _power(value: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def _block(length: int) -> int:
    """The block of columns that pads a row least; the larger where two pad the same."""
    sizes = [size for size in (1024, 512, 256, 128) if size <= _power(length)] or [_power(length)]
    return min(sizes, key=lambda size: (-(-length // size) * size, -size))
