"""Smaller sizes: symbols become numbers, and a number that many shapes share becomes a smaller one everywhere.

Types are worked out anew for each; sizes that do not fit together are no case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...program import Program
from ..rebuild import rebuild
from ..search import Search

SMALL = (2, 3, 4, 8, 16, 32, 64)
LARGEST = 200  # nodes


def fix_sizes(search: Search) -> bool:
    """Symbolic sizes become those at capture, where the fault shows there."""
    program = search.best.program
    symbolic = any(_has_symbols(n.meta.get("val")) for n in program.placeholders)
    if not symbolic or search.best.nodes > LARGEST:
        return False
    fixed = rebuild(program, static=True)
    return fixed is not None and search.tries("sizes as numbers", fixed)


def shrink_sizes(search: Search) -> bool:
    """Each size to a smaller one, in shapes and arguments alike, the largest first."""
    taken = False
    for size in _sizes(search.best.program) if search.best.nodes <= LARGEST else ():
        for smaller in SMALL:
            if smaller < size and _shrinks(search, size, smaller):
                taken = True
                break
    return taken


def _shrinks(search: Search, size: int, smaller: int) -> bool:
    multiples: Callable[[int], int] = lambda n: n // size * smaller if n > 0 and n % size == 0 else n
    alone: Callable[[int], int] = lambda n: smaller if n == size else n
    for change in (multiples, alone):
        program = rebuild(search.best.program, size=change)
        if program is not None and search.tries(f"{smaller} for the size {size}", program):
            return True
    return False


def _sizes(program: Program) -> list[int]:
    """The numbers among the sizes of inputs and parameters."""
    tensors = [n.meta.get("val") for n in (*program.placeholders, *program.weights())]
    found = {s for t in tensors if isinstance(t, torch.Tensor) for s in t.shape if isinstance(s, int) and s > 2}
    return sorted(found, reverse=True)


def _has_symbols(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(s, torch.SymInt) for s in value.shape)
    return isinstance(value, (torch.SymInt, torch.SymFloat))
