"""What pointwise operations make of one value, so that whoever has that value can make it again at little cost."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch.fx import Node

from .compat import size_hint
from .compat_joint import is_random
from .ops import Kind
from .traits import kind
from .views import viewed

SMALL = 16
"""A value that is read besides has at most that part of the result's elements: a norm's scale for each position."""
CAST = torch.ops.prims.convert_element_type.default
"""A cast, as Inductor's decompositions write it."""


def made_of(nodes: Iterable[Node], among: Collection[Node] | None = None) -> dict[Node, Node]:
    """Each of the calls, in the graph's order, that has a `source`, with that; among: what may be one (None: all)."""
    found: dict[Node, Node] = {}
    for node in nodes:
        one = source(node, found)
        if one is not None and (among is None or one in among):
            found[node] = one
    return found


def source(node: Node, sources: Mapping[Node, Node]) -> Node | None:
    """The one value that a pointwise call is made of, through calls that have such a `source`, and views, whatever
    small values it reads besides; None where there are more, or the call draws random numbers."""
    value = node.meta.get("val")
    pointwise = kind(node) is Kind.POINTWISE or node.target is CAST
    if not pointwise or is_random(node) or not isinstance(value, torch.Tensor):
        return None
    found: set[Node] = set()
    for read in node.all_input_nodes:
        given = read.meta.get("val")
        if read in sources:
            found.add(sources[read])
        elif isinstance(given, torch.Tensor) and _elements(given) * SMALL > _elements(value):
            found.add(viewed(read))
    return found.pop() if len(found) == 1 else None


def _elements(value: torch.Tensor) -> int:
    return math.prod(map(size_hint, value.shape))
