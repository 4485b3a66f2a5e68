"""Which sizes of a decoder's inputs change from call to call: asked for as symbols before they are captured as numbers.

Dynamo takes every size for fixed until it has seen two values of it, so `generate()` costs a capture for the prompt,
one for the first decode step, a third one step later when the cache has grown, and more when the next prompt has
another length. What changes can be told from the first graph already:

- a *growing* input, such as a dynamic cache, is concatenated with something along one dimension;
- an *allocated* one, such as a static cache, is written along one dimension at computed positions (`index_copy_`);
- a *prompt* is read by a graph that hands back intermediate results: a cache that begins.

Those dimensions, and what has the same length (token ids, positions, masks), become symbolic. A size that the graph
turns out to fix stays fixed: nothing is forced.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from . import compat

_JOINS = (torch.cat, torch.concat, torch.concatenate)
_WRITES = ("index_copy", "index_copy_")
_FILLS = ("copy_", "index_copy_")


def ask_for_symbols(module: GraphModule, inputs: Sequence[Any]) -> None:
    """Has Dynamo capture the graph again if sizes that will change came as numbers; returns otherwise.

    Args:
        module: Dynamo's graph, for inference.
        inputs: its example inputs, parameters included.

    Raises:
        Dynamo's own restart exception, for Dynamo to catch: a backend must let it pass.
    """
    if not compat.sizes_may_become_symbolic():
        return
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    dims, written = changing(module.graph, values)
    sizes = [(source, dim) for node, dim in dims if (source := compat.dynamo_source(node))]
    holders = {compat.dynamo_source(n).rpartition(".")[0] for n in placeholders if _is_data(n, values[n])} - {""}
    compat.capture_again_with_symbols(sizes, written, holders)


def ask_for_sequences(module: GraphModule, inputs: Sequence[Any]) -> None:
    """Has Dynamo capture the graph again if the lengths of the caller's sequences came as numbers; returns otherwise.

    A sequence is as long as token ids [batch, length], or embedded tokens [batch, length, width] where there are none.

    Raises:
        Dynamo's own restart exception, for Dynamo to catch: a backend must let it pass.
    """
    if not compat.sizes_may_become_symbolic():
        return
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    data = {n: v for n, v in zip(placeholders, inputs, strict=True) if _is_data(n, v)}
    lengths = {_size(n, 1) for n, v in data.items() if v.dim() == 2 and not v.is_floating_point()}
    lengths = lengths or {_size(n, 1) for n, v in data.items() if v.dim() == 3}
    found = [(n, d) for n, v in data.items() for d in _length_like(v) if _size(n, d) in lengths and _is_number(n, d)]
    sizes = [(source, d) for n, d in found if (source := compat.dynamo_source(n))]
    compat.capture_again_with_symbols(sizes, (), ())


def changing(graph: Graph, values: dict[Node, Any]) -> tuple[list[tuple[Node, int]], set[int]]:
    """(placeholder, dimension) of the sizes that will change, and the lengths of allocated caches."""
    data = {n: value for n, value in values.items() if _is_data(n, value)}
    returned = _returned(graph)
    found: dict[tuple[Node, int], None] = {}
    lengths: set[int] = set()
    written: set[int] = set()
    for node in graph.nodes:
        along = _along(node)
        if along is None:
            continue
        parts, dim = along
        if _name(node) in _WRITES:
            written.add(_size(node, dim))
        elif node not in returned and not any(_is_part(n) and n in returned for n in node.users):
            continue  # two inputs side by side, which nobody hands back in the next call
        for part in parts:
            if part in data:
                found[part, dim % data[part].dim()] = None
                lengths |= {_size(part, dim), _size(node, dim)}
    if not found and not written and not _begins_a_cache(graph, returned):
        return [], set()
    for node, value in data.items():  # token ids, positions and padding masks: [batch, length]
        if value.dim() == 2 and not value.is_floating_point():
            found[node, 1] = None
            lengths.add(_size(node, 1))
    lengths |= written
    for node, value in data.items():
        found.update({(node, dim): None for dim in _length_like(value) if _size(node, dim) in lengths})
    return [(n, d) for n, d in found if _is_number(n, d)], written - {0, 1}


def _is_data(node: Node, value: Any) -> bool:
    """A tensor of the caller's, no weight of the model's."""
    is_state = isinstance(value, torch.nn.Parameter) or compat.is_state_source(compat.dynamo_source(node))
    return isinstance(value, torch.Tensor) and not is_state


def _length_like(value: torch.Tensor) -> range:
    """The dimensions that may be as long as a sequence: of a mask all but the batch, of hidden states the second, of
    keys and values [batch, heads, length, width] the third."""
    if not value.is_floating_point() or (value.dim() == 4 and value.shape[1] == 1):
        return range(1, value.dim())
    return {3: range(1, 2), 4: range(2, 3)}.get(value.dim(), range(0))


def _name(node: Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    return str(getattr(node.target, "__name__", "")) if node.op == "call_function" else ""


def _along(node: Node) -> tuple[list[Node], int] | None:
    """What is concatenated or written along which dimension by this node."""
    if node.op == "call_function" and node.target in _JOINS:
        parts = node.args[0] if node.args else node.kwargs.get("tensors", ())
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        many = parts if isinstance(parts, (list, tuple)) else ()
        return ([p for p in many if isinstance(p, Node)], dim) if isinstance(dim, int) else None
    if _name(node) in _WRITES and len(node.args) > 1 and isinstance(node.args[0], Node):
        return ([node.args[0]], node.args[1]) if isinstance(node.args[1], int) else None
    return None


def _size(node: Node, dim: int) -> int:
    """A size at this capture, symbolic or not; 0 where there is none."""
    value = node.meta.get("example_value")
    known = isinstance(value, torch.Tensor) and -value.dim() <= dim < value.dim()
    return compat.size_hint(value.shape[dim], 0) if known else 0


def _is_number(node: Node, dim: int) -> bool:
    return isinstance(node.meta["example_value"].shape[dim], int) and _size(node, dim) > 1


def _returned(graph: Graph) -> set[Node]:
    output = next(iter(reversed(graph.nodes)))
    return {n for n in output.all_input_nodes if n.op != "placeholder"}


def _begins_a_cache(graph: Graph, returned: set[Node]) -> bool:
    """Whether an output is also what others are computed from, or a part of that: the prompt's keys and values are.
    An output that the graph fills in place is one too."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        if node in returned or node in needed:
            needed.update(node.all_input_nodes)
    for node in returned:
        while _is_part(node):
            node = node.all_input_nodes[0]
        uses = [n for n in node.users if n.op != "output"]
        if any(n in needed or (n in returned and not _is_part(n)) or _name(n) in _FILLS for n in uses):
            return True
    return False


def _is_part(node: Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem
