"""Index arithmetic: how an index into one shape becomes an index into another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from .call import Unsupported
from .sizes import Size, product, same
from .tile import Tile
from .values import ZERO, Index, Term

INT32 = 2**31


def offset(tile: Tile, term: Term, start: Size, step: int = 1) -> Term:
    """start + step·term."""
    if term.text.isdigit() and isinstance(start, int):
        return Term(str(start + step * int(term.text)))
    if start == 0 and step == 1:
        return term
    scaled = term.text if step == 1 else f"{term.text} * {step}"
    return tile.bind("index", scaled if start == 0 else f"{scaled} + {tile.size(start)}", term.axes)


def flatten(tile: Tile, terms: Sequence[Term], sizes: Sequence[Size]) -> Term:
    """The position in the row-major order of `sizes`."""
    pairs = [(t, s) for t, s in zip(terms, sizes, strict=True) if not same(s, 1)]
    counted = list(itertools.dropwhile(lambda pair: pair[0].text == "0", pairs))
    if not counted:
        return ZERO
    if len(counted) == 1:
        return counted[0][0] if len(pairs) == 1 else replace(counted[0][0], parts=tuple(pairs))
    total = product(s for _, s in counted)
    wide = not isinstance(total, int) or total >= INT32
    text, axes = "", frozenset[str]()
    for term, length in counted:
        part = f"tl.full((), {term.text}, tl.int64)" if wide and term.text.isdigit() else term.text
        part = f"{part}.to(tl.int64)" if wide and not part.startswith("tl.full") else part
        front = f"({text})" if " " in text else text
        text = f"{front} * {tile.size(length)} + {part}" if text else part
        axes |= term.axes
    if not axes:
        return Term(str(_constant(counted))) if isinstance(total, int) else tile.bind("index", text)
    return tile.bind("index", text, axes, parts=tuple(pairs))


def _constant(pairs: Sequence[tuple[Term, Size]]) -> int:
    value = 0
    for term, length in pairs:
        value = value * length + int(term.text)
    return value


def unflatten(tile: Tile, term: Term, sizes: Sequence[Size]) -> Index:
    """The index into `sizes` of a row-major position; undoes `flatten` where the dimensions agree."""
    wanted = [k for k, s in enumerate(sizes) if not same(s, 1)]
    found = [ZERO] * len(sizes)
    if term.text == "0" or not wanted:
        return tuple(found)
    if len(wanted) == 1:
        found[wanted[0]] = term
        return tuple(found)
    inner = [sizes[k] for k in wanted[1:]]
    front, back = split(tile, term, product(inner))
    found[wanted[0]] = front
    for k, value in zip(wanted[1:], unflatten(tile, back, inner), strict=True):
        found[k] = value
    return tuple(found)


def split(tile: Tile, term: Term, inner: Size) -> tuple[Term, Term]:
    """(term // inner, term % inner), read off the parts of `term` where one boundary falls there."""
    for k in range(1, len(term.parts)):
        if same(product(s for _, s in term.parts[k:]), inner):
            front, back = term.parts[:k], term.parts[k:]
            return (
                flatten(tile, [t for t, _ in front], [s for _, s in front]),
                flatten(tile, [t for t, _ in back], [s for _, s in back]),
            )
    if same(inner, 1):
        return term, ZERO
    if term.text.isdigit() and isinstance(inner, int):
        return Term(str(int(term.text) // inner)), Term(str(int(term.text) % inner))
    size = tile.size(inner)
    return tile.bind("index", f"{term.text} // {size}", term.axes), tile.bind(
        "index", f"{term.text} % {size}", term.axes
    )


def reshape(tile: Tile, index: Sequence[Term], shape: Sequence[Size], source: Sequence[Size]) -> Index:
    """An index into `shape` as an index into `source`, a shape of as many elements read in the same order.

    Dimensions are matched in the smallest groups of equal product, so that what was not touched stays as it is.
    """
    result = [ZERO] * len(source)
    left = [k for k, s in enumerate(shape) if not same(s, 1)]
    right = [k for k, s in enumerate(source) if not same(s, 1)]
    while left and right:
        a, b = _first_group([shape[k] for k in left], [source[k] for k in right])
        flat = flatten(tile, [index[k] for k in left[:a]], [shape[k] for k in left[:a]])
        for k, term in zip(right[:b], unflatten(tile, flat, [source[k] for k in right[:b]]), strict=True):
            result[k] = term
        left, right = left[a:], right[b:]
    return tuple(result)


def _first_group(a: Sequence[Size], b: Sequence[Size]) -> tuple[int, int]:
    """The shortest prefixes of two shapes with equal products."""
    for total in range(2, len(a) + len(b) + 1):
        for i in range(1, total):
            if i <= len(a) and 1 <= total - i <= len(b) and same(product(a[:i]), product(b[: total - i])):
                return i, total - i
    raise Unsupported(f"shapes {list(a)} and {list(b)} are not seen to have as many elements")
