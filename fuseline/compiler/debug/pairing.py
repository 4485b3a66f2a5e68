"""Which node of one program is which of another.

Stages of one dump, edited or not, share their nodes' names: there a name pairs two nodes whose shapes agree. Programs
with other names are matched by structure (`matching.py`).
"""

from __future__ import annotations

import torch

from .cells import Cell, Flat

ALIKE = 0.9  # the share of nodes with a namesake of the same op from which on names are trusted


def pair(first: Flat, second: Flat, named: dict[Cell, Cell] | None) -> dict[Cell, Cell]:
    """Cells of the second program → those of the first: namesakes of one shape, or what structure matches."""
    if named is not None:
        found = {b: a for b, a in named.items() if _same_shape(a, b)}
    else:
        found = _by_structure(first, second)
    given = [[c for c in flat.cells if c.kind == "input"] for flat in (second, first)]
    return {**found, **dict(zip(*given, strict=True))}


def namesakes(first: Flat, second: Flat) -> dict[Cell, Cell] | None:
    """Cells of the second program → those of the first by name, where both are stages of one dump by all appearance."""
    names: list[dict[tuple[str, str], Cell]] = [{}, {}]
    for known, flat in zip(names, (first, second), strict=True):
        for cell in flat.cells:
            if known.setdefault((cell.region, cell.name), cell) is not cell:
                return None
    both = [(b, names[0][key]) for key, b in names[1].items() if key in names[0]]
    alike = [b for b, a in both if b.kind == a.kind == "call" and b.target is a.target]
    if len(alike) < ALIKE * max(sum(c.kind == "call" for c in flat.cells) for flat in (first, second)):
        return None
    return {b: a for b, a in both if a.kind == b.kind != "output"}


def _by_structure(first: Flat, second: Flat) -> dict[Cell, Cell]:
    from .inlined import inlined
    from .matching import match

    found: dict[Cell, Cell] = {}
    for a, b in match(inlined(first.program).items, inlined(second.program).items).items():
        x, y = first.of.get(a.node), second.of.get(b.node)
        if isinstance(x, Cell) and isinstance(y, Cell) and x.kind == y.kind != "output" and _same_shape(x, y):
            found[y] = x
    return found


def _same_shape(a: Cell, b: Cell) -> bool:
    """Whether two cells' types agree: sizes that are numbers are equal; symbols have other names in every capture."""
    values = [c.node.meta.get("val") if c.node is not None else None for c in (a, b)]
    leaves = [torch.utils._pytree.tree_leaves(v) for v in values]
    if len(leaves[0]) != len(leaves[1]):
        return False
    for x, y in zip(*leaves, strict=True):
        if isinstance(x, torch.Tensor) != isinstance(y, torch.Tensor):
            return False
        if isinstance(x, torch.Tensor) and (
            x.dim() != y.dim() or any(type(m) is type(n) is int and m != n for m, n in zip(x.shape, y.shape))
        ):
            return False
    return True
