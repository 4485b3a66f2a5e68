"""Sites: stable names for places in a program, `model.layers.3.mlp.gate_proj/linear#0`."""

from __future__ import annotations

import re
from collections import Counter

from torch.fx import Graph, Node

from .provenance import module_path


def op_name(node: Node) -> str:
    """`linear` for `aten.linear.default`, the target's own name otherwise."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def identifier(name: str) -> str:
    """A parameter's qualified name as a Python identifier: `0.weight` → `weight_0_weight`."""
    text = re.sub(r"\W", "_", name)
    return text if text.isidentifier() else f"weight_{text}"


def sites(graph: Graph) -> dict[Node, str]:
    """Every computing node's site: module path, op, and its ordinal among equals there, calls counted."""
    counts: Counter[tuple[str, str]] = Counter()
    found: dict[Node, str] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_module"):
            key = (module_path(node), op_name(node))
            found[node] = f"{key[0]}/{key[1]}#{counts[key]}"
            counts[key] += 1
    return found
