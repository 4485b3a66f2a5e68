"""Plainer numbers: float32 throughout, and 1 where a constant stood."""

from __future__ import annotations

from typing import Any

import torch

from ..extract import calls
from ..rebuild import rebuild
from ..search import Search

OTHERS = (torch.float64, torch.float16, torch.bfloat16)


def single_precision(search: Search) -> bool:
    """float32 for every other floating-point type."""
    values = [n.meta.get("val") for n in search.best.program.graph.nodes]
    if not any(isinstance(v, torch.Tensor) and v.dtype in OTHERS for v in values):
        return False
    program = rebuild(search.best.program, dtypes=dict.fromkeys(OTHERS, torch.float32))
    return program is not None and search.tries("float32", program)


def plain_numbers(search: Search) -> bool:
    """A 1 for each floating-point constant that is neither 0 nor 1."""
    taken = False
    for node in calls(search.best.program):
        for position, value in enumerate(node.args):
            if isinstance(value, float) and value not in (0.0, 1.0):
                copied = search.best.program.copy()
                target = next((n for n in calls(copied) if n.name == node.name), None)
                if target is None:
                    continue
                arguments: list[Any] = list(target.args)
                arguments[position] = 1.0
                target.args = tuple(arguments)
                copied.module.recompile()
                taken |= search.tries(f"1 in {node.name}", copied)
    return taken
