"""The kernel being written: a tile of rows by columns, its variables, loads, and loops over long rows.

Values are two-dimensional: what varies by row has the shape [ROWS, 1], what varies along a row [1, BLOCK], the rest
follows by broadcasting. A value is written once for each (node, index, mask) at which it is asked for, so a graph is
evaluated backwards from its outputs and an op that only moves elements costs nothing but its index.

A row that is too long for one block, or whose length is symbolic, is walked in a loop. Lines that depend on the
loop's columns go into its body, all others before it: the loop is appended to the lines when it is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from .call import Unsupported, dtype_of
from .dtypes import cast, compute_dtype, is_byte_float, is_supported, literal, pointer_type, triton_type
from .sizes import Size, SizeReader, same, shape
from .values import ROW, ZERO, Blocks, Index, Mask, Names, Range, Scope, Term

DEEPEST = 60  # of nested evaluations, well below Python's limit of recursion


class Tile:
    """Writes one kernel's body. `evaluate(tile, node, index, mask)` is the emitter's dispatch on nodes."""

    def __init__(self, sizes: SizeReader, evaluate: Callable[[Tile, torch.fx.Node, Index, Mask], Term]):
        self.sizes, self.evaluate = sizes, evaluate
        self.names = Names()
        self.scopes = [Scope()]
        self.prelude = Scope()  # of a program that walks over rows: what is the same for all of them
        self.ranges: list[Range] = []
        self.pointers: dict[torch.fx.Node, str] = {}
        self.read_as_bytes: set[torch.fx.Node] = set()  # inputs of 8-bit floating-point numbers
        self.signature: dict[str, str] = {}
        self.arguments: dict[str, str] = {}  # kernel argument → its text on the host
        self.size_names: dict[Size, str] = {}
        self.blocks: Blocks | None = None  # where an op wants them otherwise than the schedule
        self.taken = 0  # lines of the body after which what was loaded is no longer asked for: the next may be read
        self.depth = 0
        self.in_order: set[tuple[str, ...]] = set()  # where a chain of ops is being evaluated from its start

    # ---- names and lines -------------------------------------------------------------------------------------

    def bind(self, wish: str, text: str, axes: frozenset[str] = frozenset(), **extra: object) -> Term:
        """A variable that holds `text`; the same text in reach gives the same variable, and so does a bare name."""
        scope = self._scope(axes)
        if text.isidentifier():
            return Term(text, axes)
        for reachable in (scope, self.scopes[0]):
            if text in reachable.texts:
                return reachable.texts[text]
        term = Term(self.names.new(wish), axes, **extra)  # type: ignore[arg-type]
        scope.lines.append(f"{term.text} = {text}")
        scope.texts[text] = term
        return term

    def _scope(self, axes: frozenset[str]) -> Scope:
        looped = {r.axis for r in self.ranges if r.looped} & axes
        if not looped:
            return self.scopes[0]
        if looped != {self.scopes[-1].axis}:
            raise Unsupported("a value varies along a row while another row is reduced")
        return self.scopes[-1]

    @contextmanager
    def before_rows(self) -> Iterator[None]:
        """What is bound inside is computed once, before a program walks over its rows: it may not depend on them."""
        body, self.scopes[0] = self.scopes[0], self.prelude
        yield
        self.scopes[0] = body

    @contextmanager
    def loop(self, columns: Range) -> Iterator[None]:
        """What is bound inside and varies along `columns` is computed block by block, when they are looped over."""
        if not columns.looped:
            yield
            return
        scope = Scope(columns.axis)
        self.scopes.append(scope)
        yield
        self.scopes.pop()
        start = columns.index.text + "_start"
        body = [f"{columns.index.text} = {start} + tl.arange(0, {columns.block})[None, :]"]
        if columns.inside is not None:
            body.append(f"{columns.inside.text} = {columns.index.text} < {columns.size_text}")
        body += [*scope.lines, f"{start} += {columns.block}"]
        # the start has the type of the length, int32 or int64; a range over an argument is beyond the interpreter
        zero = "0" if isinstance(columns.size, int) else f"0 * {columns.size_text}"
        head = [f"{start} = {zero}", f"while {start} < {columns.size_text}:"]
        self.scopes[0].lines += [*head, *("    " + line for line in body)]

    # ---- sizes and ranges ------------------------------------------------------------------------------------

    def size(self, value: Size, wish: str = "size") -> str:
        """A size as text in the kernel: a number, or an argument that the host fills in."""
        if isinstance(value, int):
            return str(value)
        if value not in self.size_names:
            host = self.sizes.text(value)
            self.size_names[value] = self.argument(wish, "i32", host)
        return self.size_names[value]

    def argument(self, wish: str, kind: str, host: str) -> str:
        name = self.names.new(wish)
        self.signature[name], self.arguments[name] = kind, host
        return name

    def columns(self, length: Size) -> Range:
        """The range that runs through `length` columns: an existing one of that length, or a new one."""
        for existing in self.ranges:
            if same(existing.size, length):
                return existing
        return self.add_range("reduced", length)

    def add_range(self, wish: str, length: Size, block: int | None = None, looped: bool | None = None) -> Range:
        """A new range. Not looped, it holds all its columns in one block of the next power of two."""
        longest = 16384
        looped = (not isinstance(length, int) or length > longest) if looped is None else looped
        count = len(self.ranges)
        axis = f"column{count}"
        index = Term(self.names.new(wish), frozenset({axis}))
        constant = f"BLOCK{count or ''}"
        text = self.size(length, f"{wish}_size" if count else "n")
        padded = looped or block is not None or length & (length - 1) or length == 0
        inside = Term(self.names.new(f"{wish}_inside"), index.axes) if padded else None
        added = Range(axis, length, text, constant, looped, index, inside)
        self.ranges.append(added)
        if not looped and block is None:
            self.scopes[0].lines.append(f"{index.text} = tl.arange(0, {constant})[None, :]")
            if inside is not None:
                self.scopes[0].lines.append(f"{inside.text} = {index.text} < {text}")
        return added

    # ---- values ----------------------------------------------------------------------------------------------

    def value(self, node: torch.fx.Node, index: Sequence[Term], mask: Mask) -> Term:
        """The node's value at `index`, in its compute type. Dimensions of size 1 are always read at 0.

        `mask` tells where the index lies inside the tensor; elsewhere the value is arbitrary.
        """
        index = tuple(ZERO if same(s, 1) else i for s, i in zip(shape(node), index, strict=True))
        key = (node, tuple(i.text for i in index), tuple(m.text for m in mask))
        for scope in (self.scopes[-1], self.scopes[0]):
            if key in scope.values:
                return scope.values[key]
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unsupported(f"views and reductions nested more than {DEEPEST} deep")
        term = self.evaluate(self, node, index, mask)
        self.depth -= 1
        self._scope(term.axes).values[key] = term
        return term

    def broadcast(self, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
        """The operand `node` of an op whose result is asked for at `index`: dimensions are aligned at the right."""
        rank = node.meta["val"].dim()
        return self.value(node, index[len(index) - rank :], mask)

    def load(self, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
        """Reads an input tensor; 16-bit floats are widened, those of 8 bits are for `decode` alone, as bytes."""
        if is_byte_float(dtype_of(node)) and node not in self.read_as_bytes:
            raise Unsupported(f"kernels do not hold {dtype_of(node)}")
        pointer, axes = self.pointer(node, self.pointers[node], index)
        conditions = [m.text for m in mask if m.axes <= axes]
        guard = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
        text, dtype = f"tl.load({pointer}{guard})", dtype_of(node)
        return self.bind(self.pointers[node], cast(text, dtype, compute_dtype(dtype)), axes)

    def pointer(self, node: torch.fx.Node, name: str, index: Index) -> tuple[str, frozenset[str]]:
        """Address arithmetic in int64, with the strides that the tensor has at run time."""
        dtype, axes, tensor = dtype_of(node), frozenset[str](), name
        if is_byte_float(dtype):
            dtype, tensor = torch.uint8, f"{name}.view(torch.uint8)"
        if not is_supported(dtype):
            raise Unsupported(f"kernels do not hold {dtype}")
        text = f"{name}_ptr"
        self.signature[text], self.arguments[text] = pointer_type(dtype), tensor
        for k, (term, length) in enumerate(zip(index, shape(node), strict=True)):
            if term.text == "0" or same(length, 1):
                continue
            stride = f"{name}_stride_{k}"
            if stride not in self.signature:
                self.signature[stride], self.arguments[stride] = "i32", f"{name}.stride({k})"
            wide = f"tl.full((), {term.text}, tl.int64)" if term.text.isdigit() else f"{term.text}.to(tl.int64)"
            text += f" + {self.bind('i', wide, term.axes).text} * {stride}"
            axes |= term.axes
        # a block of one where nothing varies: values are two-dimensional throughout
        return text if axes else f"{text} + tl.zeros([1, 1], tl.int32)", axes

    def reserve(self, node: torch.fx.Node, name: str) -> None:
        """Keeps `<name>_ptr` and `<name>_stride_<k>` for a tensor that the host calls `name`."""
        self.names.taken |= {f"{name}_ptr", *(f"{name}_stride_{k}" for k in range(node.meta["val"].dim()))}

    # ---- reductions ------------------------------------------------------------------------------------------

    def reduce(
        self,
        name: str,
        how: str,
        length: Size,
        outer: Iterable[Term],
        mask: Mask,
        dtype: torch.dtype,
        element: Callable[[Term, Mask], Term],
    ) -> Term:
        """Reduces `element(column, mask)`, of the compute type `dtype`, over `length` columns.

        how: "sum", "max" or "min". outer: the indices that pick the row; they may not vary along any column.
        """
        if any(not term.axes <= {ROW} for term in outer):
            raise Unsupported(f"{name} reduces rows that lie across the kernel's rows")
        columns = self.columns(length)
        inner = tuple(m for m in mask if m.axes <= {ROW}) + ((columns.inside,) if columns.inside else ())
        limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
        lowest, highest = (-float("inf"), float("inf")) if dtype.is_floating_point else (limits.min, limits.max)
        key = (name, how, *(t.text for t in (*outer, *inner)))
        if key in self.scopes[0].values:
            return self.scopes[0].values[key]
        identity = literal({"sum": 0, "max": lowest, "min": highest}[how], dtype)
        if columns.parts:
            result = self._reduce_parts(name, how, columns, mask, dtype, element, identity)
            return self.scopes[0].values.setdefault(key, result)

        with self.loop(columns):
            term = element(columns.index, inner)
            text = term.text
            if columns.inside is not None:
                text = f"tl.where({columns.inside.text}, {text}, {identity})"
            if not columns.looped:
                full = text if columns.axis in term.axes or columns.inside else self._spread(text, columns)
                result = self.bind(name, self._collapse(how, full, dtype), term.axes & {ROW})
                return self.scopes[0].values.setdefault(key, result)
            total = self.names.new(f"{name}_so_far")
            self.scopes[0].lines.append(f"{total} = tl.full([ROWS, {columns.block}], {identity}, {triton_type(dtype)})")
            part = self.bind(f"{name}_part", text, term.axes | {columns.axis})
            self.scopes[-1].lines.append(f"{total} = {_combine(how, total, part.text)}")
        result = self.bind(name, self._collapse(how, total, dtype), frozenset({ROW}))
        return self.scopes[0].values.setdefault(key, result)

    def _reduce_parts(
        self,
        name: str,
        how: str,
        columns: Range,
        mask: Mask,
        dtype: torch.dtype,
        element: Callable[[Term, Mask], Term],
        identity: str,
    ) -> Term:
        """The same over a row in tiles: first between them, then along both dimensions."""
        axes, total = frozenset[str](), ""
        height, width = columns.part
        for index, inside in columns.parts:
            term = element(index, tuple(m for m in mask if m.axes <= {ROW}) + ((inside,) if inside else ()))
            axes |= term.axes & {ROW}
            text = term.text
            if columns.axis not in term.axes:
                text = f"tl.broadcast_to({text}, [{height}, {width}])"
            if inside is not None:
                text = f"tl.where({inside.text}, {text}, {identity})"
            if total:
                text = f"{total} + {text}" if how == "sum" else f"tl.{how}imum({total}, {text})"
            total = self.bind(f"{name}_so_far", text, axes | {columns.axis}).text
        along_rows = f"tl.{how}({total}, 1, keep_dims=True)"
        return self.bind(name, self._collapse(how, along_rows, dtype, 0), axes)

    def _spread(self, text: str, columns: Range) -> str:
        return f"tl.broadcast_to({text}, [ROWS, {columns.block}])"

    def _collapse(self, how: str, text: str, dtype: torch.dtype, dimension: int = 1) -> str:
        result = f"tl.{how}({text}, {dimension}, keep_dims=True)"
        return result if dtype.is_floating_point else f"{result}.to({triton_type(dtype)})"


def _combine(how: str, total: str, part: str) -> str:
    """One step of a running reduction; a running extremum keeps what is not a number."""
    if how == "sum":
        return f"{total} + {part}"
    sign = ">" if how == "max" else "<"
    return f"tl.where(({part} {sign} {total}) | ({part} != {part}), {part}, {total})"
