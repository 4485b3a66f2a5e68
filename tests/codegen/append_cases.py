"""What a step adds to a cache, as regions, with its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule

from fuseline.compiler.ops import rotary
from tests.codegen.regions import region


def step(counted: bool, turned: bool, queries: bool) -> Any:
    def function(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, cos, sin, keys, values, at = given
        place = torch.arange(k.shape[2], device=k.device) + at if counted else at
        out = (rotary(q, cos, sin),) if queries else ()
        keys.index_copy_(2, place, rotary(k, cos, sin) if turned else k)
        values.index_copy_(2, place, v)
        return (*out, keys, values)

    return function


def made(function: Any, given: tuple[torch.Tensor, ...]) -> GraphModule:
    """The region, whose results are those of the writes, without inputs that nothing reads."""
    found = region(function, given)
    writes = [n for n in found.graph.nodes if n.target is torch.ops.aten.index_copy_.default]
    assert len(writes) == 2
    output = found.graph.output_node()
    output.args = ((*output.args[0][:-2], *writes),)  # type: ignore[index]
    for node in [n for n in found.graph.nodes if n.op == "placeholder" and not n.users]:
        found.graph.erase_node(node)
    found.recompile()
    return found


CASES = [  # batch, tokens, query heads, heads, channels, channels of values, counted, turned, queries
    (1, 1, 4, 2, 16, 16, True, True, True),
    (2, 3, 20, 10, 16, 16, True, True, True),
    (2, 1, 3, 3, 12, 20, True, True, True),
    (1, 4, 4, 4, 8, 8, False, True, True),
    (2, 2, 4, 2, 16, 8, False, True, False),
    (2, 5, 4, 2, 6, 6, True, False, False),
]


def inputs(case: tuple[Any, ...], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """By the names of `step`, heads as projections leave them: [B, S, H, D], seen as [B, H, S, D]."""
    batch, tokens, query_heads, heads, head, head_v, counted, _, _ = case
    torch.manual_seed(0)
    r = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    q, k, v = (r(batch, tokens, n, d).transpose(1, 2) for n, d in ((query_heads, head), (heads, head), (heads, head_v)))
    cos, sin = r(1, 1, tokens, head), r(batch, 1, tokens, head)
    at = torch.tensor([3]) if counted else torch.tensor([9, 0, 4, 7])[:tokens]
    names = ("q", "k", "v", "cos", "sin", "keys", "values", "at")
    given = (q, k, v, cos, sin, r(batch, heads, 10, head), r(batch, heads, 10, head_v), at)
    return dict(zip(names, given, strict=True))


def read(case: tuple[Any, ...], given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those that the region reads."""
    turned, queries = case[-2:]
    unread = {*(() if queries else ("q",)), *(() if turned else ("q", "cos", "sin"))}
    return {name: x for name, x in given.items() if name not in unread}
