"""Where a kernel comes from: the ops that it stands for, the user's lines, the passes that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import torch
from torch.fx import Node

from ..compiler.provenance import makers, source_lines


def about(nodes: Sequence[Node]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """`ops`, `lines` and `made_by` of a `Kernel`, each once, in the order of the nodes."""
    return (
        tuple(dict.fromkeys(map(qualified_op, nodes))),
        tuple(dict.fromkeys(short(line) for line in source_lines(nodes))),
        tuple(dict.fromkeys(maker for n in nodes for maker in makers(n))),
    )


def qualified_op(node: Node) -> str:
    """A call's op as manifests and kernels name it: `aten.linear.default`, `operator.mul`."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return f"operator.{getattr(node.target, '__name__', node.target)}"


def short(line: str) -> str:
    """`/a/b/modeling.py:7` → `modeling.py:7`: a kernel's text does not depend on where a library is installed."""
    return PurePath(line).name
