"""A program as a picture: SVG, layers from top to bottom, weights written into the nodes that read them."""

from __future__ import annotations

import html
from collections import Counter
from types import BuiltinFunctionType
from typing import Any

import networkx as nx

WIDTH, HEIGHT, GAP, DROP = 150, 30, 14, 26
STYLE = (
    "<style>.n{fill:var(--md-code-bg-color,#f4f4f4);stroke:#888}.c{stroke:#2a7ae2;stroke-width:2}"
    "text{font:11px ui-monospace,monospace;fill:var(--md-default-fg-color,#222)}"
    "path{fill:none;stroke:#999}.i{stroke-dasharray:3 3}</style>"
)


def label(node: Any) -> str:
    """An op without namespace and overload; a region by its kind; an input by its name."""
    if node.op in ("placeholder", "output"):
        return str(node.name)
    if isinstance(node.target, BuiltinFunctionType):  # arithmetic on sizes
        name = node.target.__name__
    else:
        parts = str(node.target).split("::")[-1].split(".")  # namespace, op, overload
        name = parts[1] if len(parts) == 3 else parts[0]
    weights = [a.meta["weight"] for a in node.all_input_nodes if "weight" in a.meta]
    return f"{name}{' w' if len(weights) == 1 else f' {len(weights)} w' if weights else ''}"


def draw(program: Any, changed: frozenset[str] = frozenset()) -> str:
    """The graph as SVG; nodes whose names are in `changed` are outlined.

    Weights, constants and what only computes sizes are left out.
    """
    nodes = [n for n in program.graph.nodes if n.op in ("placeholder", "call_function", "call_module") and _drawn(n)]
    graph = nx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from((a, n) for n in nodes for a in n.all_input_nodes if a in graph)
    graph.remove_nodes_from([n for n in list(graph) if n.op == "placeholder" and not graph.out_degree(n)])
    layers = _layers(graph)
    order: dict[Any, float] = {}
    place: dict[Any, tuple[float, float]] = {}
    widest = max((len(layer) for layer in layers), default=1)
    for depth, layer in enumerate(layers):
        above = lambda n: sum(order[a] for a in graph.predecessors(n)) / max(1, graph.in_degree(n))
        for position, node in enumerate(sorted(layer, key=above)):
            order[node] = position - (len(layer) - 1) / 2
            x = (widest / 2 + order[node] - 0.5) * (WIDTH + GAP)
            place[node] = x, depth * (HEIGHT + DROP)
    parts = [_edge(place[a], place[b]) for a, b in graph.edges]
    for node, (x, y) in place.items():
        kinds = f"n{' c' if node.name in changed else ''}{' i' if node.op == 'placeholder' else ''}"
        shown = html.escape(label(node))
        parts.append(
            f'<rect class="{kinds}" x="{x:.0f}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="5"/>'
            f'<text x="{x + WIDTH / 2:.0f}" y="{y + 19}" text-anchor="middle">{shown[:22]}</text>'
        )
    across, down = widest * (WIDTH + GAP), max(1, len(layers)) * (HEIGHT + DROP)
    box = f'viewBox="-4 -4 {across + 4} {down}" width="{across}" height="{down}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} style="max-width:100%">{STYLE}{"".join(parts)}</svg>'


def _layers(graph: nx.DiGraph) -> list[list[Any]]:
    """Each node below what it reads; what rests on no input (codes, positions) right above its first reader."""
    depth = {node: at for at, layer in enumerate(nx.topological_generations(graph)) for node in layer}
    moving = {n for n in graph if n.op == "placeholder"}
    moving |= {m for n in moving for m in nx.descendants(graph, n)}
    for node in reversed(list(nx.topological_sort(graph))):
        if node not in moving and graph.out_degree(node):
            depth[node] = min(depth[reader] for reader in graph.successors(node)) - 1
    layers: list[list[Any]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in graph:  # in the order of the program
        layers[depth[node]].append(node)
    return layers


def counts(program: Any) -> Counter[str]:
    return Counter(label(n) for n in program.graph.nodes if n.op in ("call_function", "call_module") and _drawn(n))


def _drawn(node: Any) -> bool:
    return hasattr(node.meta.get("val"), "shape") and "weight" not in node.meta


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    (x, y), (u, v) = start, end
    x, u, y = x + WIDTH / 2, u + WIDTH / 2, y + HEIGHT
    bend = min(40.0, (v - y) / 2 + 6)
    return f'<path d="M{x:.0f},{y} C{x:.0f},{y + bend:.0f} {u:.0f},{v - bend:.0f} {u:.0f},{v}"/>'
