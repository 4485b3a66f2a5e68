"""Where a kernel comes from: the ops that it stands for, the user's lines, the passes that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from torch.fx import Node

from ..compiler.provenance import makers, source_lines


def about(nodes: Sequence[Node]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """`ops`, `lines` and `made_by` of a `Kernel`, each once, in the order of the nodes."""
    return (
        tuple(dict.fromkeys(str(n.target) for n in nodes)),
        tuple(dict.fromkeys(short(line) for line in source_lines(nodes))),
        tuple(dict.fromkeys(maker for n in nodes for maker in makers(n))),
    )


def short(line: str) -> str:
    """`/a/b/modeling.py:7` → `modeling.py:7`: a kernel's text does not depend on where a library is installed."""
    return PurePath(line).name
