"""`fuseline::hadamard` in the emitter's kernels: whole rows in registers, read once and written once.

    x [ROWS, n] ──► [A, N] ──► H_A · x on tensor cores ──► butterflies along N ──► y [ROWS, n]

n = A·C, where A = K·2^a holds the core: a channel is (i, c), i < A. One product with H_A = core ⊗ H_{2^a}, whose
entries are made in place from the core's; then H_C.

Long rows of 16 bits: a program takes one row as tiles [P, C] of P = 64 or 128 values of i, read and written as they
are, and the next row is read meanwhile where nothing else is computed. H_C is a second product on tensor cores: the
accumulators of the first are its operand where they lie. They are float32 and become float16, each row of a tile
times the power of two that brings its largest magnitude to 2^14: 11 bits remain where the result has 8 (bfloat16);
float16 takes the sum of two. Of C beyond 64 the high bits are butterflies in a thread's registers.

    x [P, C] ──► z = H_A · x, float32 ──► float16(z · 2^e(i)) · H_C ──► · 2^-e(i) / √n ──► y [P, C]

Other rows: log2(C) butterflies between columns in float32. The columns of one product are N = (c / 2, row, c % 2): in
the accumulators the bits of `row` then lie where a thread's neighbours hold other columns, and every butterfly stays
inside of a thread when a program has four rows.

What precedes and follows the op in its region is evaluated on the same tile: SwiGLU or signs before, casts, absmax and
codes after. The tile holds the next power of two of n; A is cut into pieces of 64, of which empty ones are not
multiplied. 16-bit signs times 16-bit inputs with float32 sums are exact products; a core of other numbers is taken as
a sum of two 16-bit matrices, good to 2^-17 (bfloat16) or 2^-22. float32 is multiplied in three parts of 11 bits, as
TF32: nothing is lost but where an input is infinite, whose row becomes NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...compiler.ops import hadamard
from ...compiler.traits import arguments
from ..call import Unsupported, dtype_of
from ..dtypes import cast, compute_dtype, literal, triton_type
from ..indexing import flatten, split
from ..rows import element
from ..sizes import shape
from ..tile import Tile
from ..values import Blocks, Index, Mask, Term

LONGEST = 32768  # elements of a row, padded: 128 registers in each of 256 threads
LEAST = 16  # the least that tl.dot takes
GROUP = 64  # rows of the product that a group of four warps takes at once
HALF = 32  # the same of float32: Hopper's own products of TF32 would want their operands the other way round
WIDE = 16384  # elements of a row, padded, from which on a program has two such groups
PARTED = 4096  # elements of a row from which on a program takes it as tiles
SECOND = 64  # columns that the second product takes at once
SINGLE = 8192  # elements of a row of float32, padded: its three parts take 96 KB of shared memory
BUSY = 2048  # the same where the kernel does more than the transform
MULTIPROCESSORS = 132  # of a large GPU; as many programs as it holds at once walk over all rows
PROGRAMS = 2 * MULTIPROCESSORS  # each makes H_A once


@dataclass(frozen=True)
class Layout:
    """How a row of n channels is cut: A = order·2^log2 rows of C = n / A columns.

    piece, inner: rows and summands of one product; the padded A is a multiple of both.
    parted: a program takes one row as tiles [piece, columns]. busy: other operations stand in the kernel.
    """

    n: int
    order: int
    log2: int
    piece: int
    inner: int
    elements: int = WIDE  # of a program, where rows are shorter
    parted: bool = False
    busy: bool = False

    @property
    def rows(self) -> int:
        return self.order << self.log2

    @property
    def columns(self) -> int:
        return self.n // self.rows

    @property
    def padded(self) -> int:
        return power_of_two(self.rows)

    @property
    def block(self) -> int:
        return self.padded * self.columns

    @property
    def least_rows(self) -> int:
        """Rows of a program: a product has at least 16 columns."""
        return max(1, LEAST // self.columns)

    @property
    def blocks(self) -> Blocks:
        """2048 to 16384 elements a program, at most 128 sums in a thread; rows by fours where they are short."""
        if self.parted:
            warps = self.piece // 16
            sums = -(-self.rows // self.piece) * self.piece * self.columns // (32 * warps)
            resident = 5 if sums <= 32 else 3 if sums <= 64 and warps == 4 else 2 if warps == 4 or sums <= 64 else 1
            return Blocks(1, 1, warps, resident * MULTIPROCESSORS, ahead=not self.busy)
        rows = min(4, self.elements // self.block) if self.block >= 512 else 2048 // self.block
        return Blocks(max(1, self.least_rows, rows), self.least_rows, 4 * max(1, self.piece // GROUP), PROGRAMS)


def layout(n: int, order: int, busy: bool = False, single: bool = False) -> Layout:
    """The cut of n = order·2^m: the largest A that one product takes, else A = order in several.

    busy: other operations stand in the kernel and want registers, so that a thread gets fewer elements.
    single: the input is float32, of which three parts are multiplied, all of them in shared memory.
    """
    if not single and n >= PARTED and (found := _parted(n, order, busy)):
        return found
    padded = power_of_two(n)
    wide = padded >= (BUSY if busy else WIDE)
    piece = HALF if single else 2 * GROUP if wide else GROUP
    elements = SINGLE // 2 if single else WIDE
    fits = [a for a in range((n // order).bit_length()) if order << a <= piece]
    if fits:
        whole = power_of_two(order << fits[-1])
        return Layout(n, order, fits[-1], whole, whole, elements)
    if not single:
        piece = GROUP if padded <= WIDE and not busy else 2 * GROUP
    return Layout(n, order, 0, piece, GROUP, elements)


def _parted(n: int, order: int, busy: bool) -> Layout | None:
    """The cut into tiles of 64 rows for four warps or of 128 for eight, at most 128 sums in a thread."""
    for piece in (GROUP, 2 * GROUP):
        log2 = max(0, (piece // order).bit_length() - 1)
        log2 += n // (order << log2) > (2 if busy else 4) * SECOND
        if (n // order) % (1 << log2):
            continue
        cut = Layout(n, order, log2, piece, piece, parted=True, busy=busy)
        count = -(-cut.rows // piece)
        if LEAST <= cut.columns <= 4 * SECOND and count * cut.columns <= 4 * SECOND and count <= 3:
            return cut
    return None


def part(nodes: list[torch.fx.Node], length: object) -> tuple[int, int] | None:
    """The shape of the tiles as which a kernel over rows of this length takes each, where its transforms agree."""
    shapes: set[tuple[int, int] | None] = set()
    for node in nodes:
        if node.target is hadamard.overload:
            try:
                cut = cut_of(node)
            except Unsupported:
                return None
            whole = cut.parted and cut.n == shape(arguments(node)["x"])[-1] == length
            shapes.add((cut.piece, cut.columns) if whole else None)
    return shapes.pop() if len(shapes) == 1 else None


def power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def rule(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """The value of the op at an index whose last entry runs through the rows of the kernel's tile."""
    given = arguments(node)
    x, core = given["x"], given["core"]
    cut = cut_of(node)
    compute = compute_dtype(dtype_of(x))
    if compute is not torch.float32:
        raise Unsupported(f"it is computed in {str(compute)[6:]}, kernels compute it in float32")
    channels = shape(x)[-1]
    which, within = split(tile, index[-1], cut.n) if channels != cut.n else (None, index[-1])
    columns = tile.columns(cut.n)
    if columns.parts:
        return _of_parts(tile, node, cut, index, mask)
    if columns.looped or within.text != columns.index.text or any(not t.axes <= {"row"} for t in index[:-1]):
        raise Unsupported("it needs whole rows of its own block of channels")
    outer = (*index[:-1], *((which,) if which is not None else ()))
    key = (node, "whole row", *(t.text for t in outer))
    if key not in tile.scopes[0].values:
        inner = tuple(m for m in mask if m.axes <= {"row"}) + ((columns.inside,) if columns.inside else ())
        channel = columns.index if which is None else flatten(tile, (which, columns.index), (channels // cut.n, cut.n))
        value = element(tile, x, (*index[:-1], channel), inner, compute)
        tile.blocks = cut.blocks
        axes = columns.index.axes.union(*(t.axes for t in outer))
        tile.scopes[0].values[key] = Writer(tile, node, cut, core, dtype_of(x), axes).write(value, columns.inside)
    return tile.scopes[0].values[key]


def _of_parts(tile: Tile, node: torch.fx.Node, cut: Layout, index: Index, mask: Mask) -> Term:
    """The same where a program takes a row as tiles: all of them are computed when the first is asked for."""
    columns, outer = tile.columns(cut.n), index[:-1]
    names = [place.text for place, _ in columns.parts]
    if index[-1].text not in names or any(not t.axes <= {"row"} for t in outer):
        raise Unsupported("it needs whole rows of its own block of channels")
    keys = [(node, "whole row", name, *(t.text for t in outer)) for name in names]
    values = tile.scopes[0].values
    if keys[0] not in values:
        given = arguments(node)
        rows = tuple(m for m in mask if m.axes <= {"row"})
        parts = (
            (element(tile, given["x"], (*outer, place), rows + ((inside,) if inside else ()), torch.float32), inside)
            for place, inside in columns.parts
        )
        tile.blocks = cut.blocks
        axes = columns.index.axes.union(*(t.axes for t in outer))
        writer = Writer(tile, node, cut, given["core"], dtype_of(given["x"]), axes)
        values.update(zip(keys, writer.write_parts(parts), strict=True))
    return values[keys[names.index(index[-1].text)]]


def cut_of(node: torch.fx.Node) -> Layout:
    """Raises Unsupported for a row that no program holds."""
    given = arguments(node)
    n = given["block"] or shape(given["x"])[-1]
    if not isinstance(n, int):
        raise Unsupported("a symbolic number of channels")
    core = given["core"]
    order = 1 if core is None else shape(core)[0]
    alone = given["x"].op == "placeholder" and all(user.op == "output" for user in node.users)
    single = dtype_of(given["x"]) is torch.float32
    cut, longest = layout(n, order, not alone, single), SINGLE if single else LONGEST
    if cut.block > longest:
        raise Unsupported(f"{n} channels, a program holds at most {longest}{' of float32' if single else ''}")
    if single and order > GROUP:
        raise Unsupported(f"a core of {order} rows in float32, at most {GROUP} in registers")
    if cut.padded < LEAST:
        raise Unsupported(f"{n} channels, a product takes at least {LEAST}")
    return cut


class Writer:
    """Writes one transform into a kernel. Its variables begin with `h`."""

    def __init__(
        self,
        tile: Tile,
        node: torch.fx.Node,
        cut: Layout,
        core: torch.fx.Node | None,
        dtype: torch.dtype,
        axes: frozenset[str],
    ):
        """axes: along which the result varies; not along the rows where there is one for the whole kernel."""
        self.tile, self.node, self.cut, self.core, self.dtype, self.axes = tile, node, cut, core, dtype, axes
        self.lines = tile.scopes[0].lines

    def write(self, x: Term, inside: Term | None) -> Term:
        cut, tile = self.cut, self.tile
        zero, one_row = literal(0, torch.float32), "row" not in self.axes
        text = x.text if inside is None else f"tl.where({inside.text}, {x.text}, {zero})"
        if "row" not in x.axes or not inside and not x.axes > {"row"}:
            text = f"tl.broadcast_to({text}, [ROWS, {cut.block}])"
        if one_row:  # the others of the tile stay empty
            text = f"tl.where(tl.arange(0, ROWS)[:, None] == 0, {text}, {zero}) if ROWS > 1 else {text}"
        row = self.bind("row", f"({text})" if one_row else text)
        single = self.dtype is torch.float32
        parts = [self._apart(term) for term in (self._terms(row) if single else [row])]
        if not single:
            # Rounded last: Triton's memory layouts of a product's operand cannot all be reshaped where they lie.
            parts = [[self.bind("part", cast(part, torch.float32, self.dtype)) for part in parts[0]]]
        sums = [self._product(i, parts) for i in range(-(-cut.rows // cut.piece))]
        result = self._together([self._butterflies(s) for s in sums])
        if one_row:
            result = self.bind("only", f"tl.sum({result}, 0, keep_dims=True) if ROWS > 1 else {result}")
        scale = (cut.columns << cut.log2) * (cut.order if self._exact else 1)
        return tile.bind(self.node.name, f"{result} * {literal(scale**-0.5, torch.float32)}", self.axes)

    def write_parts(self, parts: Iterable[tuple[Term, Term | None]]) -> list[Term]:
        """[piece, columns] each, of one row, and where they hold channels → the same of the result.

        Each is rounded when it is evaluated: the next one then finds registers.
        """
        cut, operands = self.cut, []
        for x, inside in parts:
            text = x.text
            if inside is not None and arguments(self.node)["x"].op != "placeholder":
                # what is loaded is zero beyond the row's end, what is computed may be anything
                text = f"tl.where({inside.text}, {text}, {literal(0, torch.float32)})"
            if not x.axes - {"row"}:
                text = f"tl.broadcast_to({text}, [{cut.piece}, {cut.columns}])"
            operands.append(self.bind("part", cast(f"({text})", torch.float32, self.dtype)))
        scale = ((cut.columns << cut.log2) * (cut.order if self._exact else 1)) ** -0.5
        self.tile.taken = len(self.lines)
        found = [self._second(self._product(i, [operands]), scale) for i in range(len(operands))]
        return [self.tile.bind(self.node.name, text, self.axes) for text in found]

    def bind(self, wish: str, text: str) -> str:
        return self.tile.bind(f"h_{wish}", text, self.axes).text

    def pair(self, text: str) -> tuple[str, str]:
        first, second = self.tile.names.new("h_first"), self.tile.names.new("h_second")
        self.lines.append(f"{first}, {second} = tl.split({text})")
        return first, second

    @property
    def _exact(self) -> bool:
        """Whether the core holds signs."""
        signs = arguments(self.node)["signs"]
        return self.core is not None and (signs or dtype_of(self.core) is torch.int8)

    @property
    def _lanes(self) -> str:
        """The columns of a product, highest first: (c / 2, row, c % 2), or the rows alone."""
        c = self.cut.columns
        return f"{c // 2}, ROWS, 2" if c > 1 else "ROWS"

    @property
    def _columns(self) -> str:
        return f"ROWS * {self.cut.columns}" if self.cut.columns > 1 else "ROWS"

    def _apart(self, x: str) -> list[str]:
        """[ROWS, block] → [inner, N] each, those that hold channels."""
        cut = self.cut
        slots = cut.padded // cut.inner
        lead = [f"{slots}"] if slots > 1 else []
        tail = [f"{cut.columns // 2}", "2"] if cut.columns > 1 else []
        dims = ", ".join(["ROWS", *lead, f"{cut.inner}", *tail])
        k = len(lead)
        # rows, [slot], inner, [c / 2, c % 2]  →  inner, [c / 2], rows, [c % 2], [slot]
        order = [1 + k, *([2 + k] if tail else []), 0, *([3 + k] if tail else []), *([1] if lead else [])]
        turned = self.bind("turned", f"tl.permute(tl.reshape({x}, [{dims}]), {order})")
        twos = ", 2" * (slots.bit_length() - 1)
        found = [self.bind("part", f"tl.reshape({turned}, [{cut.inner}, {self._columns}{twos}])")]
        while len(found) < slots:  # the last dimension is the lowest bit that is left
            pairs = [self.pair(f) for f in found]
            found = [p[0] for p in pairs] + [p[1] for p in pairs]
        return found[: -(-cut.rows // cut.inner)]

    def _product(self, i: int, terms: list[list[str]]) -> str:
        """Rows i·piece … of H_A times x, in float32: `terms` of x in their pieces, each times the terms of H_A."""
        precision = ', input_precision="tf32"' if self.dtype is torch.float32 else ""
        pairs: list[tuple[int, str, str]] = []
        for j in range(len(terms[0])):
            with self.tile.before_rows():
                matrices = self._entries(i, j)
            pairs += [(a + b, m, x[j]) for a, m in enumerate(matrices) for b, x in enumerate(terms) if a + b <= 2]
        total = ""
        for _, matrix, part in sorted(pairs, key=lambda pair: -pair[0]):  # the small ones first
            more = f", {total}" if total else ""
            total = self.bind("sum", f"tl.dot({matrix}, {part}{more}{precision})")
        return total

    def _terms(self, x: str) -> list[str]:
        """A float32 value as the sum of three whose mantissas have 11 bits, which tensor cores multiply exactly."""
        high = self._leading(x)
        rest = self.bind("rest", f"{x} - {high}")
        middle = self._leading(rest)
        return [high, middle, self.bind("rest", f"{rest} - {middle}")]

    def _leading(self, x: str) -> str:
        return self.bind("high", f"({x}.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)")

    def _entries(self, i: int, j: int) -> list[str]:
        """H_A[j·inner …, i·piece …], transposed, in the input's type; terms of a sum where one is not exact."""
        cut, dtype = self.cut, triton_type(self.dtype)
        whole = self._core(i, j, cut.log2) if self.core is not None else self._signs(cut.log2 - cut.log2 // 2)
        low = cut.log2 if self.core is not None else cut.log2 // 2
        if low:  # the Kronecker product with H of the low bits
            outer, inner = cut.piece >> low, 1 << low
            first = f"tl.reshape({whole}, [{outer}, 1, {cut.inner >> low}, 1])"
            second = f"tl.reshape({self._signs(low)}, [1, {inner}, 1, {inner}])"
            whole = self.constant("matrix", f"tl.reshape({first} * {second}, [{cut.piece}, {cut.inner}])")
        signs = self.core is None or self._exact
        if self.dtype is torch.float32:
            return [whole] if signs else self._terms(whole)
        high = self.constant("matrix", f"{whole}.to({dtype})")
        return [high] if signs else [high, self.constant("rest", f"({whole} - {high}.to(tl.float32)).to({dtype})")]

    def constant(self, wish: str, text: str) -> str:
        return self.tile.bind(f"h_{wish}", text, frozenset({"h_to", "h_from"})).text

    def _core(self, i: int, j: int, log2: int) -> str:
        """The core's entries that rows i·piece … and summands j·inner … meet, transposed, in float32; zero beyond."""
        cut, tile = self.cut, self.tile
        ends: list[Term] = []
        found: list[Term] = []
        for axis, part, size, dims in (("h_from", j, cut.inner, "[None, :]"), ("h_to", i, cut.piece, "[:, None]")):
            size >>= log2
            start = f"{part * size} + " if part else ""
            term = tile.bind(axis, f"{start}tl.arange(0, {size}){dims}", frozenset({axis}))
            found.append(term)
            if (part + 1) * size > cut.order:
                ends.append(tile.bind("h_inside", f"{term.text} < {cut.order}", term.axes))
        assert self.core is not None
        entry = tile.load(self.core, tuple(found), tuple(ends))
        return self.constant("core", cast(entry.text, compute_dtype(dtype_of(self.core)), torch.float32))

    def _signs(self, log2: int) -> str:
        """H of 2^log2 in float32: −1 where two numbers share an odd count of bits."""
        a, b = (
            self.tile.bind("h_bit", f"tl.arange(0, {1 << log2}){dims}", frozenset({axis})).text
            for axis, dims in (("h_to", "[:, None]"), ("h_from", "[None, :]"))
        )
        bits = self.constant("bits", f"{a} & {b}")
        for shift in (4, 2, 1):
            if log2 > shift:
                bits = self.constant("bits", f"{bits} ^ ({bits} >> {shift})")
        return self.constant("signs", f"(1 - 2 * ({bits} & 1)).to(tl.float32)")

    def _second(self, z: str, scale: float) -> str:
        """z · H_C · scale, z [piece, C]: butterflies between halves of the columns down to 64, then products."""
        cut, size = self.cut, self.cut.columns
        parts = [z]
        while size > SECOND:
            size //= 2
            pairs = [self.pair(f"tl.permute(tl.reshape({p}, [{cut.piece}, 2, {size}]), [0, 2, 1])") for p in parts]
            parts = [self.bind("sum", f"{a} {sign} {b}") for a, b in pairs for sign in "+-"]
        with self.tile.before_rows():
            matrix = self.constant("matrix", f"{self._signs(size.bit_length() - 1)}.to(tl.float16)")
        parts = [self._scaled_product(p, matrix, scale) for p in parts]
        while len(parts) > 1:
            size *= 2
            joined = [f"tl.permute(tl.join({a}, {b}), [0, 2, 1])" for a, b in zip(parts[::2], parts[1::2], strict=True)]
            parts = [self.bind("joined", f"tl.reshape({j}, [{cut.piece}, {size}])") for j in joined]
        return parts[0]

    def _scaled_product(self, z: str, matrix: str, scale: float) -> str:
        """z · matrix · scale, whose operand is float16: each row times 2^(14 − e), e the exponent of its largest."""
        largest = self.bind("largest", f"tl.max(tl.abs({z}), 1, keep_dims=True)")
        # biased by 127; both powers are normal numbers
        exponent = self.bind("exponent", f"tl.maximum({largest}.to(tl.int32, bitcast=True) >> 23, 15)")
        up = self.bind("up", f"((268 - {exponent}) << 23).to(tl.float32, bitcast=True)")
        down = self.bind("down", f"(({exponent} - 14) << 23).to(tl.float32, bitcast=True) * {scale}")
        lifted = self.bind("lifted", f"{z} * {up}")
        high = self.bind("high", f"{lifted}.to(tl.float16)")
        product = self.bind("product", f"tl.dot({high}, {matrix})")
        if self.dtype is torch.float16:
            rest = self.bind("rest", f"({lifted} - {high}.to(tl.float32)).to(tl.float16)")
            product = self.bind("product", f"tl.dot({rest}, {matrix}, {product})")
        return self.bind("turned", f"{product} * {down}")

    def _butterflies(self, x: str) -> str:
        """a + b, a − b between columns whose c differs in one bit, for each bit."""
        cut = self.cut
        for bit in reversed(range(cut.columns.bit_length() - 1)):
            if bit:
                # (c / 2, row, c % 2) as (above, this bit, below · row · c % 2)
                above, below = cut.columns >> (bit + 1), 1 << bit
                dims = f"[{cut.piece}, {above}, 2, {below} * ROWS]"
                turned = self.bind("turned", f"tl.permute(tl.reshape({x}, {dims}), [0, 1, 3, 2])")
                a, b = self.pair(turned)
                joined = self.bind("joined", f"tl.permute(tl.join({a} + {b}, {a} - {b}), [0, 1, 3, 2])")
            else:
                a, b = self.pair(f"tl.reshape({x}, [{cut.piece}, {cut.columns // 2} * ROWS, 2])")
                joined = self.bind("joined", f"tl.join({a} + {b}, {a} - {b})")
            x = self.bind("sum", f"tl.reshape({joined}, [{cut.piece}, {self._columns}])")
        return x

    def _together(self, parts: list[str]) -> str:
        """[piece, N] each → [ROWS, block]."""
        cut = self.cut
        slots = cut.padded // cut.piece
        if slots > len(parts):
            empty = self.bind("empty", f"tl.zeros([{cut.piece}, {self._columns}], tl.float32)")
            parts = [*parts, *[empty] * (slots - len(parts))]
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [self.bind("joined", f"tl.join({a}, {b})") for a, b in zip(parts[:half], parts[half:], strict=True)]
        lead, tail = slots > 1, cut.columns > 1
        dims = ", ".join([f"{cut.piece}", self._lanes, *([f"{slots}"] if lead else [])])
        # piece, [c / 2], rows, [c % 2], [slot]  →  rows, [slot], piece, [c / 2, c % 2]
        order = [2 if tail else 1, *([(4 if tail else 2)] if lead else []), 0, *([1, 3] if tail else [])]
        turned = self.bind("turned", f"tl.permute(tl.reshape({parts[0]}, [{dims}]), {order})")
        return self.bind("row", f"tl.reshape({turned}, [ROWS, {cut.block}])")


def domains(node: torch.fx.Node) -> tuple[tuple[object, ...], ...]:
    """Shapes over which the blocks are whole rows."""
    given = arguments(node)
    lead, channels, n = shape(given["x"])[:-1], shape(given["x"])[-1], given["block"]
    return ((*lead, channels),) if n in (0, channels) else ((*lead, channels // n, n),)
