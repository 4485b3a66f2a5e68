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

A few long rows alone, as in decoding, are shared by many programs: `hadamard_few.py`.

What precedes and follows the op in its region is evaluated on the same tile: SwiGLU or signs before, casts, absmax and
codes after. The tile holds the next power of two of n; A is cut into pieces of 64, of which empty ones are not
multiplied. 16-bit signs times 16-bit inputs with float32 sums are exact products; a core of other numbers is taken as
a sum of two 16-bit matrices, good to 2^-17 (bfloat16) or 2^-22. float32 is multiplied in three parts of 11 bits, as
TF32: nothing is lost but where an input is infinite, whose row becomes NaN.
"""

from __future__ import annotations

import torch

from ...compiler.ops import hadamard
from ...compiler.traits import arguments
from ..call import Unsupported, dtype_of
from ..dtypes import compute_dtype
from ..indexing import flatten, split
from ..rows import element
from ..sizes import shape
from ..tile import Tile
from ..values import Index, Mask, Term
from .hadamard_layout import GROUP, LEAST, LONGEST, SINGLE, Layout, layout
from .hadamard_writer import Writer


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


def domains(node: torch.fx.Node) -> tuple[tuple[object, ...], ...]:
    """Shapes over which the blocks are whole rows."""
    given = arguments(node)
    lead, channels, n = shape(given["x"])[:-1], shape(given["x"])[-1], given["block"]
    return ((*lead, channels),) if n in (0, channels) else ((*lead, channels // n, n),)
