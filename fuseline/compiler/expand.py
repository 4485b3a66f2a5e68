"""Expanding quantized weights, for targets that have no kernel reading packed codes: once, or where each is used."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.fx import GraphModule, Node

from .expressions import Dequantize, Expression
from .ops import dequantize

BLOCK = defaultdict(lambda: 1 << 24, cpu=1 << 18)
"""Weights expanded at a time, by device: what a CPU's caches hold; elsewhere, enough to be worth the launches."""


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


def expand_at_use(module: GraphModule) -> GraphModule:
    """Has every `dequantize` run right before its first use, and block by block; returns the module.

    One weight at a time is expanded, with little memory beside it. The values are the same to the bit.
    """
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if node.target is dequantize.overload:
            node.target = dequantize_in_blocks
            if node.users:
                min(node.users, key=order.__getitem__).prepend(node)
    module.recompile()
    return module


def dequantize_in_blocks(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """`fuseline::dequantize`, some rows at a time, so that its intermediate values stay small."""
    channels = codes.shape[-1] * (2 if bits == 4 else 1)
    values = torch.empty((*codes.shape[:-1], channels), dtype=dtype, device=codes.device)
    rows = max(1, BLOCK[codes.device.type] // channels)
    split = lambda tensor: tensor.flatten(0, -2).split(rows)
    parts = [split(values), split(codes), split(scale), *([split(zero)] if zero is not None else [])]
    for block, *given in zip(*parts, strict=True):
        block.copy_(dequantize.naive(*given[:2], given[2] if zero is not None else None, bits, group, dtype))
    return values
