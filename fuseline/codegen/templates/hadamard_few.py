"""`fuseline::hadamard` of a few rows, as when decoding: many programs a row, each of which reads all of it.

One program would take a long row in several microseconds, on one multiprocessor of a hundred. Here a program writes a
block of the result alone. A channel is (i, c), i < A = order·2^a, c < C; for a block I of rows and J of columns

    s[i, J]  =  x[i, :] · H_C[:, J]            16-bit numbers and signs: exact products, float32 sums
    y[I, J]  =  H_Aᵀ[I, :] · s[:, J] / √n      s in two parts of float16, 22 bits below its largest magnitude

so that the row's bytes, which lie in L2, are all that is read more than once. A row with an infinity becomes NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...compiler.ops import hadamard
from ...compiler.traits import arguments
from ..about import about
from ..call import dtype_of
from ..dtypes import cast, compute_dtype, literal, triton_type
from ..host import Host
from ..indexing import unflatten
from ..kernel import Kernel, Launcher
from ..kernel_text import kernel_source
from ..schedule import Domain, Launch
from ..sizes import product, shape
from ..tile import Tile
from ..values import ZERO, Index, Term
from .hadamard_layout import Layout, power_of_two
from .hadamard_writer import signs

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
    padded = power_of_two(order << log2)
    cut = Layout(channels, order, log2, min(padded, TALL), padded)
    if cut.columns < WIDE or padded > 4 * TALL:
        return None
    return Block(node, cut).launcher(host, rows)


class Block:
    """The text of the kernel. cut: A and C are its rows and columns, and a program takes its `piece` of rows.

    down, across: how many programs share a row, by rows of H_A and by columns.
    """

    def __init__(self, node: torch.fx.Node, cut: Layout):
        self.node, self.cut = node, cut
        given = arguments(node)
        self.x, self.core = given["x"], given["core"]
        self.exact = self.core is None or given["signs"] or dtype_of(self.core) is torch.int8
        self.down, self.across = -(-cut.rows // cut.piece), cut.columns // WIDE

    def launcher(self, host: Host, rows: int) -> Launcher:
        tile = Tile(host.sizes, lambda tile, node, index, mask: tile.load(node, index, mask))
        tile.pointers = dict(host.inputs)
        for placeholder, text in host.inputs.items():
            tile.reserve(placeholder, text)
        output = host.outputs[0]
        tile.reserve(output.node, output.name)
        self._write(tile, output.name, rows)
        source, signature = kernel_source(f"{host.name}_kernel", tile, {})
        ops, lines, made_by = about([self.node])
        kernel = Kernel(
            name=f"{host.name}_kernel",
            source=source,
            signature=signature,
            constants={},
            ops=ops,
            lines=lines,
            made_by=made_by,
            num_warps=4 if self.cut.block <= 1 << 14 else 8,
            num_stages=2,
            buffers=host.buffers(signature),
        )
        launch = Launch({}, {}, str(rows * self.down * self.across), kernel.num_warps)
        domain = Domain(shape(self.node)[:-1], shape(self.node)[-1])
        return host.launcher(kernel, tile.arguments, domain, launch, rows_only=False)

    def _write(self, tile: Tile, name: str, rows: int) -> None:
        cut, lines, lead, dtype = self.cut, tile.scopes[0].lines, shape(self.node)[:-1], dtype_of(self.x)
        lines.append("pid = tl.program_id(0)")
        row = tile.bind("row", f"pid // {self.down * self.across}") if rows > 1 else ZERO
        outer = unflatten(tile, row, lead)
        start = f"pid // {self.across} % {self.down} * {cut.piece} + " if self.down > 1 else ""
        to = tile.bind("to", f"{start}tl.arange(0, {cut.piece})[:, None]", _DOWN)
        column = tile.bind("column", f"pid % {self.across} * {WIDE} + tl.arange(0, {WIDE})[None, :]", _ACROSS)
        total = self._sums(tile, outer, column)
        # both powers of two are normal numbers, of the biased exponent of the largest magnitude
        largest = tile.bind("largest", f"tl.max(tl.max(tl.abs({total}), 1), 0)").text
        exponent = tile.bind("exponent", f"tl.maximum({largest}.to(tl.int32, bitcast=True) >> 23, 15)").text
        lifted = tile.bind("lifted", f"{total} * ((268 - {exponent}) << 23).to(tl.float32, bitcast=True)", _BOTH).text
        parts, matrix = self._parts(tile, lifted, True), self._matrix(tile, to)
        y = ""
        for a, b in ((0, 1), (1, 0), (0, 0)):  # the small ones first
            if a < len(matrix):
                y = tile.bind("y", f"tl.dot({matrix[a]}, {parts[b]}{', ' if y else ''}{y})", _BOTH).text
        down = tile.bind("down", f"(({exponent} - 14) << 23).to(tl.float32, bitcast=True)").text
        result = tile.bind("result", f"{y} * ({down} * {literal(cut.scale(self.exact), torch.float32)})", _BOTH).text
        channel = tile.bind("channel", f"{to.text} * {cut.columns} + {column.text}", _BOTH)
        pointer, _ = tile.pointer(self.node, name, (*outer, channel))
        guard = f", mask={to.text} < {cut.rows}" if self.down * cut.piece > cut.rows else ""
        lines.append(f"tl.store({pointer}, {cast(result, torch.float32, dtype)}{guard})")

    def _sums(self, tile: Tile, outer: Index, column: Term) -> str:
        """s [A, WIDE] in float32, zero beyond A."""
        cut = self.cut
        i = tile.bind("i", f"tl.arange(0, {cut.padded})[:, None]", _DOWN)
        c = tile.bind("c", f"tl.arange(0, {cut.columns})[None, :]", _ACROSS)
        channel = tile.bind("channel", f"{i.text} * {cut.columns} + {c.text}", _BOTH)
        inside = (tile.bind("inside", f"{i.text} < {cut.rows}", _DOWN),) if cut.padded > cut.rows else ()
        x = tile.load(self.x, (*outer, channel), inside).text
        x = tile.bind("x", cast(x, torch.float32, dtype_of(self.x)), _BOTH).text
        summand = tile.bind("summand", f"tl.arange(0, {cut.columns})[:, None]", _DOWN).text
        matrix = signs(_binder(tile), f"{summand} & {column.text}", cut.columns.bit_length() - 1)
        return tile.bind("s", f"tl.dot({x}, {matrix}.to({triton_type(dtype_of(self.x))}))", _BOTH).text

    def _matrix(self, tile: Tile, to: Term) -> list[str]:
        """Rows `to` of H_Aᵀ [tall, A], without its scale, in float16; in two parts where one is not exact."""
        cut, bind = self.cut, _binder(tile)
        come = tile.bind("come", f"tl.arange(0, {cut.padded})[None, :]", _ACROSS)
        both = f"{to.text} & {come.text}"
        if self.core is None:
            return [bind("matrix", f"{signs(bind, both, cut.log2)}.to(tl.float16)")]
        index = tuple(tile.bind("entry", f"{t.text} >> {cut.log2}", t.axes) if cut.log2 else t for t in (come, to))
        masks = tuple(
            tile.bind("known", f"{t.text} < {cut.rows}", t.axes)
            for t, size in ((to, self.down * cut.piece), (come, cut.padded))
            if size > cut.rows
        )
        text = cast(tile.load(self.core, index, masks).text, compute_dtype(dtype_of(self.core)), torch.float32)
        if cut.log2:
            text = f"{text} * {signs(bind, f'{both} & {(1 << cut.log2) - 1}', cut.log2)}"
        return self._parts(tile, bind("matrix", text), not self.exact)

    def _parts(self, tile: Tile, x: str, two: bool) -> list[str]:
        """float32 as float16, or as the sum of two."""
        bind = _binder(tile)
        high = bind("high", f"{x}.to(tl.float16)")
        return [high, bind("rest", f"({x} - {high}.to(tl.float32)).to(tl.float16)")] if two else [high]


def _binder(tile: Tile) -> Callable[[str, str], str]:
    return lambda wish, text: tile.bind(wish, text, _BOTH).text


_DOWN, _ACROSS, _BOTH = frozenset({"down"}), frozenset({"across"}), frozenset({"down", "across"})
