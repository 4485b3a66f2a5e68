"""Names in kernels, by role and op and not by graph: regions of the same shape in two layers get the same text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch.fx import Node

from .text import Names

if TYPE_CHECKING:
    from .anchor import Norm, Section

# What the kernels and the host function call their own variables, with any suffix.
RESERVED_STEMS = frozenset(
    """tl triton torch libdevice min row rows m block pid pids first height n inside x h k j k0 j0 piece group live
    squares total mean rstd acc w codes scale zero magic out q q0 q1 turn chunk part parts split words at left
    right high x_rows x_columns blocks z r t up index slot kept""".split()  # noqa: SIM905
)


def canonical_names(
    x: Node,
    norm: Norm | None,
    sections: Iterable[Section],
    placeholders: Iterable[Node],
    extra: Mapping[Node, str],
    x_scale: Node | None = None,
) -> dict[Node, str]:
    """A name for every node that a kernel or the host function mentions; no two are equal."""
    names = Names(())
    found = {x: names.new("x")}

    def give(node: Node | None, wish: str) -> None:
        if node is not None and node not in found:
            found[node] = names.new(wish)

    give(x_scale, "x_scale")
    if norm is not None:
        give(norm.weight, "norm_weight")
        give(norm.bias, "norm_bias")
    sections = tuple(sections)
    linears = [linear for section in sections for linear in section.linears]
    for number, linear in enumerate(linears):
        suffix = f"_{number}" if len(linears) > 1 else ""
        give(linear.node, f"linear{suffix}")
        give(linear.weight.tensor, f"{'codes' if linear.weight.scale else 'weight'}{suffix}")
        give(linear.weight.scale, f"scale{suffix}")
        give(linear.weight.zero, f"zero{suffix}")
        give(getattr(linear.weight, "outer", None), f"outer{suffix}")
        give(linear.bias, f"bias{suffix}")
    for section in sections:
        for node in section.pointwise:
            give(node, _of_op(node))
    for node, wish in extra.items():
        give(node, wish)
    others = [node for node in placeholders if node not in found]
    for number, node in enumerate(others):
        give(node, f"other{f'_{number}' if len(others) > 1 else ''}")
    return found


def _of_op(node: Node) -> str:
    """`aten.mul.Tensor` → "mul", and with an underscore what would clash with a kernel's own variables."""
    name = re.sub(r"\W", "_", node.target._opname).strip("_")
    return f"{name}_" if name.split("_")[0] in RESERVED_STEMS else name


def loaded_name(name: str) -> str:
    """The variable for a placeholder's loaded values."""
    return f"{name}_value"
