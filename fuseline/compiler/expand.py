"""Expanding quantized weights once, for targets that have no kernel reading packed codes."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from .expressions import Dequantize, Expression
from .ops import dequantize


def expand_weights(module: GraphModule, weights: list[Expression]) -> list[Expression]:
    """Replaces every `dequantize` of weights in a lifted graph by a weight of its own; returns the new weights.

    The values are those that the graph would compute at each call: the results are the same to the bit, at the speed
    of the original weights. The expanded copy comes on top of the originals' memory.
    """
    graph = module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    of_node = dict(zip(inputs[len(inputs) - len(weights) :], weights, strict=True))
    expanded: dict[Expression, Node] = {}
    last = inputs[-1] if inputs else None
    for node in list(graph.nodes):
        if node.target is not dequantize.overload:
            continue
        codes, scale, zero, bits, group, dtype = node.args
        if codes not in of_node or scale not in of_node or (zero is not None and zero not in of_node):
            continue
        expression = Dequantize(of_node[codes], of_node[scale], of_node[zero] if zero else None, bits, group, dtype)
        if expression not in expanded:
            assert last is not None
            with graph.inserting_after(last):
                last = graph.placeholder(f"expanded_{len(expanded)}_{codes.name}")  # type: ignore[union-attr]
            last.meta = {**node.meta, "weight": expression}
            expanded[expression] = last
        node.replace_all_uses_with(expanded[expression])
        graph.erase_node(node)
    for placeholder in list(of_node):
        if not placeholder.users:
            graph.erase_node(placeholder)
            del of_node[placeholder]
    module.recompile()
    return [*of_node.values(), *expanded]
