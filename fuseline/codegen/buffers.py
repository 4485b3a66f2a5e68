"""The buffer plan: which results of regions can lie in memory that is used again at every call.

A result that a kernel of ours writes, and that nothing keeps beyond the call, needs no allocation of its own: it is
live from the region that writes it to the last node that reads it or an alias of it. Shapes may be symbolic, so the
emitted module describes such results by a function of the sizes; `runtime/arena.py` lays them out for each set of
sizes. What an output may be an alias of is left alone: it is the caller's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..compiler.compat import may_return_an_input
from .call import Unsupported
from .kernel import Launcher, Out
from .kernel_text import call
from .sizes import SizeReader

Value = tuple[Node, int]
"""A region's call, and which of its results."""

SIZES, PLAN, VALUES = "planned_sizes", "PLAN", "planned"


@dataclass(frozen=True)
class Planned:
    """The plan in an emitted module: `source` before `call`, `first_line` in it, and the keywords of regions' calls."""

    source: str = ""
    first_line: str = ""
    keywords: dict[str, str] = field(default_factory=dict)


def plan(module: GraphModule, launchers: Mapping[str, Launcher]) -> Planned:
    """The plan for the regions that `module` calls; `launchers`: region → its host function, where it has one."""
    nodes = list(module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    reader = SizeReader(placeholders, [str(n.target) for n in placeholders])
    names: dict[Any, str] = {}  # symbol → parameter of the function of sizes
    rows: list[tuple[Value, Out, str]] = []
    devices: dict[Value, torch.device] = {}
    for (node, result), (first, last) in live(module, launchers).items():
        out = next((o for o in launchers[str(node.target)].outs if o.result == result), None)
        if out is None:
            continue
        value = node.meta["val"][result] if isinstance(node.meta["val"], (tuple, list)) else node.meta["val"]
        try:
            for symbol in _symbols(out):
                reader.text(symbol)  # Unsupported where no input tells it
                names.setdefault(symbol, str(symbol))
        except Unsupported:
            continue
        devices[node, result] = value.device
        rows.append(((node, result), out, f"{first}, {last}"))
    device = next(iter(devices.values()), None)
    witness = next((n for n in placeholders if getattr(n.meta.get("val"), "device", None) == device), None)
    rows = [row for row in rows if devices[row[0]] == device]
    if not rows or witness is None or {SIZES, PLAN, VALUES} & {n.name for n in nodes}:
        return Planned()
    sizes = SizeReader([], [])
    sizes.known = dict(names)
    described = []
    for _, out, lifetime in rows:
        strides = "None" if out.strides is None else _tuple(sizes, out.strides)
        described.append(f"({_tuple(sizes, out.shape)}, {strides}, {out.dtype}, {lifetime}),")
    source = "\n".join(
        [
            f"def {SIZES}({', '.join(names.values())}):",
            '    """Shape, strides, dtype, first and last use of each result that nothing keeps beyond the call."""',
            "    return (",
            *(f"        {line}" for line in described),
            "    )",
            "",
            "",
            f"{PLAN} = Plan({SIZES})",
        ]
    )
    keywords: dict[str, list[str]] = {}
    for place, ((node, _), out, _) in enumerate(rows):
        keywords.setdefault(str(node.target), []).append(f"{out.parameter}={VALUES}[{place}]")
    given = [str(witness.target), *(reader.text(symbol) for symbol in names)]
    line = "\n".join(call(f"{VALUES} = {PLAN}(", given, ")", "    "))
    return Planned(source, line, {name: ", ".join(texts) for name, texts in keywords.items()})


def live(module: GraphModule, launchers: Mapping[str, Launcher]) -> dict[Value, tuple[int, int]]:
    """Each result of a region's kernels that the call's results are no alias of: the nodes, by their numbers, that
    write it and that use it last."""
    graph = module.graph
    held = _held(graph, {}, lambda name: _region(module, name), launchers, own=True)
    number = {node: k for k, node in enumerate(graph.nodes)}
    escaped = _all(held[graph.find_nodes(op="output")[0]])
    found: dict[Value, tuple[int, int]] = {}
    for node in graph.nodes:
        for value in _all(held[node]) | {v for n in node.all_input_nodes for v in _all(held[n])}:
            if value not in escaped:
                found[value] = number[value[0]], number[node]
    # in the order of the graph: that of a set of nodes is another in each process, and so would be the emitted text
    return dict(sorted(found.items(), key=lambda item: (number[item[0][0]], item[0][1])))


Held = Any  # a set of values, or a list of such sets for several results


def _held(
    graph: Graph,
    given: Mapping[Node, Held],
    region: Callable[[str], GraphModule],
    launchers: Mapping[str, Launcher],
    own: bool,
) -> dict[Node, Held]:
    """Of each node, the values whose memory its result may lie in. own: whether results of kernels count as values."""
    held: dict[Node, Held] = {}
    for node in graph.nodes:
        inputs = [held[n] for n in node.all_input_nodes]
        if node.op == "placeholder":
            held[node] = given.get(node, set())
        elif node.op == "output":
            held[node] = [_of(held, r) for r in node.args[0]] if _several(node.args[0]) else _of(held, node.args[0])
        elif node.op == "call_module":
            held[node] = _through(node, [held[a] for a in node.args], region(str(node.target)), launchers, own)
        elif node.target is operator.getitem:
            source = held[node.args[0]]
            held[node] = source[node.args[1]] if isinstance(source, list) else source
        elif may_return_an_input(node.target):
            held[node] = set().union(*map(_all, inputs))
        else:
            held[node] = set()
    return held


def _through(
    node: Node, arguments: Sequence[Held], region: GraphModule, launchers: Mapping[str, Launcher], own: bool
) -> Held:
    """What the results of a region's call may lie in."""
    placeholders = region.graph.find_nodes(op="placeholder")
    given = dict(zip(placeholders, arguments, strict=True))
    output = region.graph.find_nodes(op="output")[0]
    if str(node.target) not in launchers:
        return _held(region.graph, given, lambda name: _region(region, name), launchers, own=False)[output]
    results = output.args[0] if _several(output.args[0]) else (output.args[0],)
    held = [
        given.get(r, set()) if not isinstance(r, Node) or r.op == "placeholder"
        else ({(node, results.index(r))} if own else set())
        for r in results
    ]  # fmt: skip
    return held if _several(output.args[0]) else held[0]


def _region(module: GraphModule, name: str) -> GraphModule:
    found = module.get_submodule(name)
    assert isinstance(found, GraphModule)
    return found


def _of(held: Mapping[Node, Held], result: Any) -> Held:
    return held[result] if isinstance(result, Node) else set()


def _several(result: Any) -> bool:
    return isinstance(result, (tuple, list))


def _all(held: Held) -> set[Value]:
    return set().union(*held) if isinstance(held, list) else held


def _symbols(out: Out) -> list[Any]:
    sizes = [s for s in (*out.shape, *(out.strides or ())) if not isinstance(s, int)]
    return sorted({symbol for s in sizes for symbol in s.free_symbols}, key=str)


def _tuple(sizes: SizeReader, values: Sequence[Any]) -> str:
    texts = [sizes.text(v) for v in values]
    return f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"
