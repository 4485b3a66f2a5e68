"""Keys and values rounded before attention reads them, as a cache of codes would hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from ..compiler.program import Program
from ..compiler.provenance import module_path
from ..compiler.rewriter import Builder, Rewriter
from ..compiler.schemes import Scheme
from .quantize_values import round_trip
from .rotation.carriers import is_attention
from .rotation.keys import cached


def rounded_attention(
    program: Program, rewriter: Rewriter, keys: Scheme | None, values: Scheme | None, left_out: Callable[[str], bool]
) -> None:
    """Rounds the keys and values of every attention that makes them itself, one scale a head and token.

    left_out: says of a module's path whether its attention is left as it is.
    """
    for node in [n for n in program.graph.nodes if is_attention(n)]:
        if left_out(module_path(node)):
            continue
        given: Any = node.args
        wanted = {1: keys, 2: values}
        reason = next((r for at, scheme in wanted.items() if scheme and (r := _refuse(given[at], scheme))), None)
        if reason:
            rewriter.refuse(node, reason)
            continue

        def build(new: Builder, node: Node = node, wanted: dict[int, Scheme | None] = wanted) -> Node:
            arguments = list(node.args)
            for at, scheme in wanted.items():
                if scheme is not None:
                    arguments[at] = round_trip(new, node.args[at], scheme)  # type: ignore[arg-type]
            return new(node.target, *arguments, **node.kwargs)

        rewriter.rewrite(node, [node], build, "attention")


def _refuse(value: Node, scheme: Scheme) -> str | None:
    reason = cached(value)
    if reason:
        return f"a cache of codes is not written yet, and its keys or values {reason}"
    return scheme.refuse_group(int(value.meta["val"].shape[-1]))
