"""Shorter chains: a node gives way to one of its operands of the same type."""

from __future__ import annotations

import torch
from torch.fx import Node

from ...program import Program
from ...structure import describe_value
from ..extract import calls, extract, results
from ..search import Search

LARGEST = 400  # nodes; beyond it, cutting is left to do its work first


def bypass(search: Search) -> bool:
    """Replaces nodes by their operands, one at a time, the last first."""
    taken = False
    names = [n.name for n in calls(search.best.program)]
    for name in reversed(names) if len(names) <= LARGEST else ():
        for position in range(_operands(search.best.program, name)):
            program = _bypassed(search.best.program, name, position)
            if program is None:
                continue
            kept = extract(program, {n.name for n in calls(program)}, search.values, {n.name for n in results(program)})
            if kept is not None and search.tries(f"without {name}", kept):
                taken = True
                break
    return taken


def _operands(program: Program, name: str) -> int:
    node = _find(program, name)
    return len(_alike(node)) if node is not None else 0


def _bypassed(program: Program, name: str, position: int) -> Program | None:
    """A copy in which an operand stands for the node of this name."""
    copied = program.copy()
    node = _find(copied, name)
    operands = _alike(node) if node is not None else []
    if node is None or position >= len(operands):
        return None
    node.replace_all_uses_with(operands[position])
    copied.graph.erase_node(node)
    copied.module.recompile()
    return copied


def _alike(node: Node) -> list[Node]:
    """A node's operands that are tensors of its own type."""
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return []
    wanted = describe_value(node.meta["val"])
    return [n for n in node.all_input_nodes if describe_value(n.meta.get("val")) == wanted]


def _find(program: Program, name: str) -> Node | None:
    return next((n for n in calls(program) if n.name == name), None)
