"""What the cost model counts of one call besides its FLOPs and bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph

from fuseline.compiler.costs import workspace

aten = torch.ops.aten
BACKWARDS = {
    "flash": (aten._scaled_dot_product_flash_attention_backward.default, (None, None, 100, 100, 0.0, True, None, None)),
    "cudnn": (
        aten._scaled_dot_product_cudnn_attention_backward.default,
        (None, None, None, None, None, 100, 100, 0.0, True),
    ),
}


@pytest.mark.parametrize(("op", "rest"), BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize(("heads", "expected"), [(8, 0), (2, 2 * (2 * 8 * 100 * 64) * 2)], ids=["own", "shared"])
def test_attention_sums_in_float32_and_for_each_query_head(op: Any, rest: Any, heads: int, expected: int) -> None:
    graph, given = Graph(), []
    shapes = [(2, 8, 100, 64), (2, 8, 100, 64), (2, heads, 100, 64), (2, heads, 100, 64), (2, 8, 100, 64), (2, 8, 100)]
    for i, shape in enumerate(shapes):  # gradient, q, k, v, result, logsumexp
        given.append(graph.placeholder(f"x{i}"))
        given[-1].meta["val"] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    node = graph.call_function(op, (*given, *rest))
    assert workspace(node) == 4 * (2 * 8 * 100 * 64) + expected


def test_other_calls_have_none() -> None:
    graph = Graph()
    assert workspace(graph.call_function(torch.ops.aten.mm.default, (graph.placeholder("x"),))) == 0
