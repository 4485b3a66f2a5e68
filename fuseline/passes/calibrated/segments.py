"""Cutting a program where a single value crosses, so that each part can be trained by itself.

In a transformer that is behind each residual addition: a part is an attention with its norm, or an MLP. What counts are
the values that the first product reads, those that made it, and all that comes from them; others (masks, rotary tables)
cross cuts as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from ...compiler.order import touches_written
from ...compiler.program import Program
from ..quantize_sites import Site


@dataclass(frozen=True)
class Segment:
    """nodes: in order, up to and with the one whose value crosses the cut behind them, `result`; sites: among them."""

    nodes: tuple[Node, ...]
    sites: tuple[Site, ...]
    result: Node


def segments(program: Program, sites: Sequence[Site]) -> tuple[list[Segment], dict[Node, str]]:
    """The parts that have sites, in order, and why other sites are in none.

    What follows the last cut, a head among others, is in none: nothing behind it could be compared.
    """
    of = {site.node: site for site in sites}
    moving = dependents(program, stream(sites[0])) if sites else set()
    found: list[Segment] = []
    refused: dict[Node, str] = {}
    part: list[Node] = []
    alive: set[Node] = set()
    waiting = {node: set(node.users) for node in moving}
    for node in program.graph.nodes:
        if node.op == "output":
            break
        part.append(node)
        for source in node.all_input_nodes:
            if source in alive:
                waiting[source].discard(node)
                if not waiting[source]:
                    alive.discard(source)
        if node in moving:
            alive.add(node)
        inside = [of[n] for n in part if n in of]
        if not inside or alive != {node} or not _floating(node):
            continue
        writers = [n for n in part if n in moving and touches_written(n)]
        if writers:
            reason = f"{writers[0].name} writes in place, and would do so in every round of training"
            refused.update({site.node: reason for site in inside})
        else:
            found.append(Segment(tuple(part), tuple(inside), node))
        part = []
    refused.update({n: "no single value crosses the program behind it" for n in part if n in of})
    return found, refused


def stream(site: Site) -> set[Node]:
    """What a site reads, and the floating-point values that it was made of."""
    found: set[Node] = set()
    pending = [site.x]
    while pending:
        node = pending.pop()
        if node not in found and node.op != "get_attr" and _floating(node):
            found.add(node)
            pending += node.all_input_nodes
    return found


def dependents(program: Program, sources: Collection[Node]) -> set[Node]:
    """The sources and all that depends on them."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if node in sources or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
