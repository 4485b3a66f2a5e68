"""Expanding quantized weights, for targets that have no kernel reading packed codes: once, or where each is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .expressions import Decode, Dequantize, Expression
from .ops import decode, dequantize

BLOCK = defaultdict(lambda: 1 << 24, cpu=1 << 18)
"""Weights expanded at a time, by device: what a CPU's caches hold; elsewhere, enough to be worth the launches."""

EXPANSIONS: dict[Any, type[Expression]] = {dequantize.overload: Dequantize, decode.overload: Decode}


def expand_weights(module: GraphModule, weights: list[Expression]) -> list[Expression]:
    """Replaces every expansion of a weight's codes in a lifted graph by a weight of its own; returns the new weights.

    The values are those that the graph would compute at each call: the results are the same to the bit, at the speed
    of the original weights. The expanded copy comes on top of the originals' memory.
    """
    graph = module.graph
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    of_node = dict(zip(inputs[len(inputs) - len(weights) :], weights, strict=True))
    expanded: dict[Expression, Node] = {}
    last = inputs[-1] if inputs else None
    for node in list(graph.nodes):
        if node.target not in EXPANSIONS:
            continue
        parts = [argument for argument in node.args if isinstance(argument, Node)]
        if any(part not in of_node for part in parts):
            continue
        given: list[Any] = [of_node[a] if isinstance(a, Node) else a for a in node.args]
        codes, expression = parts[0], EXPANSIONS[node.target](*given)
        if expression not in expanded:
            assert last is not None
            with graph.inserting_after(last):
                last = graph.placeholder(f"expanded_{len(expanded)}_{codes.name}")
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
    """Has every `dequantize` and `decode` run right before its first use, and block by block; returns the module.

    One weight at a time is expanded, with little memory beside it. The values are the same to the bit.
    """
    order = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if node.target in EXPANSIONS:
            node.target = dequantize_in_blocks if node.target is dequantize.overload else decode_in_blocks
            if node.users:
                min(node.users, key=order.__getitem__).prepend(node)
    module.recompile()
    return module


def dequantize_in_blocks(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """`fuseline::dequantize`, some rows at a time, so that its intermediate values stay small."""
    channels = codes.shape[-1] * (2 if bits == 4 else 1)
    expand = lambda *rows: dequantize.naive(*rows, bits, group, dtype)
    return _by_rows(channels, dtype, (codes, scale, zero), expand)


def decode_in_blocks(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    outer: torch.Tensor | None,
    format: str,
    group: int,
    packed: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`fuseline::decode`, some rows at a time; at once where one scale serves all rows."""
    if codes.shape[:-1] != scale.shape[:-1]:
        return decode.naive(codes, scale, zero, outer, format, group, packed, dtype)  # type: ignore[no-any-return]
    expand = lambda *rows: decode.naive(*rows, outer, format, group, packed, dtype)
    return _by_rows(scale.shape[-1] * group, dtype, (codes, scale, zero), expand)


def _by_rows(
    channels: int,
    dtype: torch.dtype,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    expand: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """expand(codes, scale, zero) of some rows of each, put together."""
    codes = tensors[0]
    values = torch.empty((*codes.shape[:-1], channels), dtype=dtype, device=codes.device)
    rows = max(1, BLOCK[codes.device.type] // channels)
    blocks = values.flatten(0, -2).split(rows)
    given = [[None] * len(blocks) if t is None else t.flatten(0, -2).split(rows) for t in tensors]
    for block, *parts in zip(blocks, *given, strict=True):
        block.copy_(expand(*parts))
    return values
