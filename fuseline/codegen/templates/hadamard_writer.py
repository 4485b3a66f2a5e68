"""The text of one Hadamard transform in a kernel: `hadamard.py` says what is computed, and why so."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ...compiler.traits import arguments
from ..call import dtype_of
from ..dtypes import cast, compute_dtype, literal, triton_type
from ..tile import Tile
from ..values import Term
from .hadamard_layout import SECOND, Layout


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
        return tile.bind(self.node.name, f"{result} * {literal(cut.scale(self._exact), torch.float32)}", self.axes)

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
        scale = cut.scale(self._exact)
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
        """H of 2^log2 in float32."""
        a, b = (
            self.tile.bind("h_bit", f"tl.arange(0, {1 << log2}){dims}", frozenset({axis})).text
            for axis, dims in (("h_to", "[:, None]"), ("h_from", "[None, :]"))
        )
        return signs(self.constant, f"{a} & {b}", log2)

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


def signs(bind: Callable[[str, str], str], both: str, bits: int) -> str:
    """The entries of a Hadamard matrix in float32, −1 where two numbers share an odd count of bits.

    both: the bits that they share, of `bits` that they have; bind: gives a text a name, after a wish.
    """
    found = bind("bits", both)
    for shift in (8, 4, 2, 1):
        if bits > shift:
            found = bind("bits", f"{found} ^ ({found} >> {shift})")
    return bind("signs", f"(1 - 2 * ({found} & 1)).to(tl.float32)")
