"""`fuseline::hadamard` of a few rows, as when decoding: many programs a row, each of which reads all of it.

One program would take a long row in several microseconds, on one multiprocessor of a hundred. Here a program writes a
block of the result alone. A channel is (i, c), i < A = order·2^a, c < C; for a block I of rows and J of columns

    s[i, J]  =  x[i, :] · H_C[:, J]            16-bit numbers and signs: exact products, float32 sums
    y[I, J]  =  H_Aᵀ[I, :] · s[:, J] / √n      s in two parts of float16, 22 bits below its largest magnitude

so that the row's bytes, which lie in L2, are all that is read more than once. A row with an infinity becomes NaN.
"""

from __future__ import annotations

import torch

from ...compiler.ops import hadamard
from ...compiler.provenance import makers, source_lines
from ...compiler.traits import arguments
from ..call import dtype_of
from ..dtypes import cast, compute_dtype, literal, triton_type
from ..host import Host
from ..indexing import unflatten
from ..kernel import BufferUse, Kernel, Launcher
from ..kernel_text import kernel_source
from ..schedule import Domain, Launch
from ..sizes import product, shape
from ..tile import Tile
from ..values import ZERO, Index, Term
from .hadamard_layout import power_of_two

FEW = 16  # rows
SHORTEST = 8192  # channels: below, one program takes a row as fast
LONGEST = 1 << 15
TALL = 64  # rows of H_A that a program takes, and what A is at most where the core is smaller
WIDE = 16  # columns that a program takes, and the least of H_C


def emit_few(nodes: list[torch.fx.Node], host: Host) -> Launcher | None:
    """The launcher of a region that is one transform of a known, small number of long rows of 16 bits; else None."""
    calls = [n for n in nodes if n.op == "call_function"]
    if [n.target for n in calls] != [hadamard.overload] or not host.outputs or host.outputs[0].node is not calls[0]:
        return None
    given, node = arguments(calls[0]), calls[0]
    x, core, channels = given["x"], given["core"], shape(node)[-1]
    rows = product(shape(x)[:-1])
    if dtype_of(x) not in (torch.bfloat16, torch.float16) or not isinstance(channels, int) or not isinstance(rows, int):
        return None
    if given["block"] not in (0, channels) or not 0 < rows <= FEW or not SHORTEST <= channels <= LONGEST:
        return None
    order = 1 if core is None else int(shape(core)[0])
    log2 = min(max(0, (TALL // order).bit_length() - 1), (channels // order).bit_length() - 1)
    block = Block(node, order, log2, channels // (order << log2))
    if block.columns < WIDE or block.height > 4 * TALL:
        return None
    return block.launcher(host, rows)


class Block:
    """The cut of a row, H_n = H_A ⊗ H_C with A = order·2^log2 and C = columns, and the text of the kernel.

    height, tall: A padded to a power of two, and how many of its rows a program takes.
    """

    def __init__(self, node: torch.fx.Node, order: int, log2: int, columns: int):
        self.node, self.order, self.log2, self.columns = node, order, log2, columns
        self.rows = order << log2
        self.height = power_of_two(self.rows)
        self.tall = min(self.height, TALL)
        given = arguments(node)
        self.x, self.core = given["x"], given["core"]
        self.exact = self.core is None or given["signs"] or dtype_of(self.core) is torch.int8
        self.down, self.across = -(-self.rows // self.tall), columns // WIDE

    def launcher(self, host: Host, rows: int) -> Launcher:
        tile = Tile(host.sizes, lambda tile, node, index, mask: tile.load(node, index, mask))
        tile.pointers = dict(host.inputs)
        for placeholder, text in host.inputs.items():
            tile.reserve(placeholder, text)
        output = host.outputs[0]
        tile.reserve(output.node, output.name)
        self._write(tile, output.name, rows)
        source, signature = kernel_source(f"{host.name}_kernel", tile, {})
        uses = {f"{text}_ptr": (n.name, "read") for n, text in host.inputs.items()}
        uses[f"{output.name}_ptr"] = (output.node.name, "write")
        kernel = Kernel(
            name=f"{host.name}_kernel",
            source=source,
            signature=signature,
            constants={},
            ops=(str(self.node.target),),
            lines=tuple(dict.fromkeys(line.rpartition("/")[2] for line in source_lines([self.node]))),
            made_by=tuple(makers(self.node)),
            num_warps=4 if self.height * self.columns <= 1 << 14 else 8,
            num_stages=2,
            buffers=tuple(BufferUse(a, *uses[a]) for a in signature if a in uses),
        )
        launch = Launch({}, {}, str(rows * self.down * self.across), kernel.num_warps)
        domain = Domain(shape(self.node)[:-1], shape(self.node)[-1])
        return host.launcher(kernel, tile.arguments, domain, launch, rows_only=False)

    def _write(self, tile: Tile, name: str, rows: int) -> None:
        lines, lead, dtype = tile.scopes[0].lines, shape(self.node)[:-1], dtype_of(self.x)
        lines.append("pid = tl.program_id(0)")
        row = tile.bind("row", f"pid // {self.down * self.across}") if rows > 1 else ZERO
        outer = unflatten(tile, row, lead)
        start = f"pid // {self.across} % {self.down} * {self.tall} + " if self.down > 1 else ""
        to = tile.bind("to", f"{start}tl.arange(0, {self.tall})[:, None]", _DOWN)
        column = tile.bind("column", f"pid % {self.across} * {WIDE} + tl.arange(0, {WIDE})[None, :]", _ACROSS)
        total = self._sums(tile, outer, column)
        # both powers of two are normal numbers, of the biased exponent of the largest magnitude
        largest = tile.bind("largest", f"tl.max(tl.max(tl.abs({total}), 1), 0)").text
        exponent = tile.bind("exponent", f"tl.maximum({largest}.to(tl.int32, bitcast=True) >> 23, 15)").text
        lifted = tile.bind("lifted", f"{total} * ((268 - {exponent}) << 23).to(tl.float32, bitcast=True)", _BOTH).text
        parts = self._parts(tile, lifted, True)
        y = ""
        for a, b in ((0, 1), (1, 0), (0, 0)):  # the small ones first
            matrix = self._matrix(tile, to)
            if a < len(matrix):
                y = tile.bind("y", f"tl.dot({matrix[a]}, {parts[b]}{', ' if y else ''}{y})", _BOTH).text
        down = tile.bind("down", f"(({exponent} - 14) << 23).to(tl.float32, bitcast=True)").text
        scale = (self.columns << self.log2) * (self.order if self.core is not None and self.exact else 1)
        result = tile.bind("result", f"{y} * ({down} * {literal(scale**-0.5, torch.float32)})", _BOTH).text
        channel = tile.bind("channel", f"{to.text} * {self.columns} + {column.text}", _BOTH)
        pointer, _ = tile.pointer(self.node, name, (*outer, channel))
        guard = f", mask={to.text} < {self.rows}" if self.down * self.tall > self.rows else ""
        lines.append(f"tl.store({pointer}, {cast(result, torch.float32, dtype)}{guard})")

    def _sums(self, tile: Tile, outer: Index, column: Term) -> str:
        """s [A, WIDE] in float32, zero beyond A."""
        i = tile.bind("i", f"tl.arange(0, {self.height})[:, None]", _DOWN)
        c = tile.bind("c", f"tl.arange(0, {self.columns})[None, :]", _ACROSS)
        channel = tile.bind("channel", f"{i.text} * {self.columns} + {c.text}", _BOTH)
        inside = (tile.bind("inside", f"{i.text} < {self.rows}", _DOWN),) if self.height > self.rows else ()
        x = tile.load(self.x, (*outer, channel), inside).text
        x = tile.bind("x", cast(x, torch.float32, dtype_of(self.x)), _BOTH).text
        summand = tile.bind("summand", f"tl.arange(0, {self.columns})[:, None]", _DOWN).text
        matrix = self._signs(tile, f"{summand} & {column.text}", self.columns.bit_length() - 1)
        return tile.bind("s", f"tl.dot({x}, {matrix}.to({triton_type(dtype_of(self.x))}))", _BOTH).text

    def _matrix(self, tile: Tile, to: Term) -> list[str]:
        """Rows `to` of H_Aᵀ [tall, A], without its scale, in float16; in two parts where one is not exact."""
        come = tile.bind("come", f"tl.arange(0, {self.height})[None, :]", _ACROSS)
        both = f"{to.text} & {come.text}"
        if self.core is None:
            return [tile.bind("matrix", f"{self._signs(tile, both, self.log2)}.to(tl.float16)", _BOTH).text]
        index = tuple(tile.bind("entry", f"{t.text} >> {self.log2}", t.axes) if self.log2 else t for t in (come, to))
        masks = tuple(
            tile.bind("known", f"{t.text} < {self.rows}", t.axes)
            for t, size in ((to, self.down * self.tall), (come, self.height))
            if size > self.rows
        )
        text = cast(tile.load(self.core, index, masks).text, compute_dtype(dtype_of(self.core)), torch.float32)
        if self.log2:
            text = f"{text} * {self._signs(tile, f'{both} & {(1 << self.log2) - 1}', self.log2)}"
        return self._parts(tile, tile.bind("matrix", text, _BOTH).text, not self.exact)

    def _parts(self, tile: Tile, x: str, two: bool) -> list[str]:
        """float32 as float16, or as the sum of two."""
        high = tile.bind("high", f"{x}.to(tl.float16)", _BOTH).text
        rest = tile.bind("rest", f"({x} - {high}.to(tl.float32)).to(tl.float16)", _BOTH).text if two else ""
        return [high, rest] if two else [high]

    def _signs(self, tile: Tile, both: str, bits: int) -> str:
        """−1 where the number has an odd count of bits, of `bits` that it may have; in float32."""
        found = tile.bind("bits", both, _BOTH).text
        for shift in (8, 4, 2, 1):
            if bits > shift:
                found = tile.bind("bits", f"{found} ^ ({found} >> {shift})", _BOTH).text
        return tile.bind("signs", f"(1 - 2 * ({found} & 1)).to(tl.float32)", _BOTH).text


_DOWN, _ACROSS, _BOTH = frozenset({"down"}), frozenset({"across"}), frozenset({"down", "across"})
