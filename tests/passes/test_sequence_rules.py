"""The table of rules behind `sequence-parallel`, held to the ops: what is said to work row by row does.

Where a rule says that a dimension of the inputs goes with one of the result, the op on some positions along it has to
give those positions of the result.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph, Node

from fuseline.compiler.ops import glu, rms_norm, rotary
from fuseline.passes.sequence.rules import find
from fuseline.passes.sequence.rules._define import Rowwise

aten = torch.ops.aten
X = torch.randn(2, 3, 4).double()
W = torch.randn(5, 4).double()
IDS = torch.tensor([[0, 2, 1], [3, 4, 1]])

CASES: list[tuple[Any, ...]] = [
    (aten.add.Tensor, X, torch.randn(3, 1).double()),
    (aten.mul.Tensor, X, 2.0),
    (aten.where.self, X > 0, X, torch.randn(4).double()),
    (aten.tanh.default, X),
    (aten.to.dtype, X, torch.float32),
    (aten.clone.default, X),
    (aten.layer_norm.default, X, [4], W[0], W[1]),
    (aten.layer_norm.default, X, [3, 4]),
    (rms_norm.overload, X, W[0], 1e-6),
    (glu.overload, X, X + 1, "silu"),
    (rotary.overload, X, torch.randn(3, 4).double(), torch.randn(3, 4).double()),
    (aten.embedding.default, W, IDS),
    (aten.one_hot.default, IDS, 5),
    (aten.softmax.int, X, -1),
    (aten.cumsum.default, X, 2),
    (aten.topk.default, X, 2, -1),
    (aten.sort.default, X, 1),
    (aten.linear.default, X, W, torch.randn(5).double()),
    (aten.addmm.default, torch.randn(5).double(), X[0], W.t()),
    (aten.addmm.default, torch.randn(3, 5).double(), X[0], W.t()),
    (aten.matmul.default, X, W.t()),
    (aten.matmul.default, X, torch.randn(4).double()),
    (aten.matmul.default, X, torch.randn(2, 4, 6).double()),
    (aten.matmul.default, torch.randn(5, 1, 3, 4).double(), torch.randn(2, 4, 6).double()),
    (aten.bmm.default, X, torch.randn(2, 4, 6).double()),
    (aten.transpose.int, X, 0, 2),
    (aten.permute.default, X, [2, 0, 1]),
    (aten.movedim.int, X, 0, 2),
    (aten.t.default, X[0]),
    (aten.slice.Tensor, X, 1, 1, 3),
    (aten.select.int, X, 1, 2),
    (aten.unbind.int, X, 1),
    (aten.split.Tensor, X, 2, 2),
    (aten.chunk.default, X, 2, 2),
    (aten.cat.default, [X, X + 1], 1),
    (aten.stack.default, [X, X + 1], 1),
    (aten.pad.default, X, [1, 0]),
    (aten.repeat_interleave.self_int, X, 2, 1),
    (aten.sum.dim_IntList, X, [1]),
    (aten.mean.dim, X, [-1], True),
    (aten.amax.default, X, [0]),
    (aten.argmax.default, X, 1),
    (aten.var.correction, X, [2]),
    (aten.max.dim, X, 1),
    (aten.gather.default, X, 2, torch.randint(0, 4, (2, 3, 2))),
    (aten.scatter.value, X, 2, torch.randint(0, 4, (2, 3, 1)), 0.0),
    (aten.index_select.default, X, 1, torch.tensor([2, 0])),
    (aten.index.Tensor, W, [IDS]),
    (aten.index.Tensor, X, [None, torch.tensor([0, 2])]),
    (aten.index.Tensor, X, [torch.tensor([0, 1]), torch.tensor([2, 1])]),
    (aten.index.Tensor, X, [torch.tensor([0, 1]), None, torch.tensor([[3], [1]])]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]).removeprefix("aten."))
def test_row_by_row(case: tuple[Any, ...]) -> None:
    target, *args = case
    graph = Graph()
    inputs: list[tuple[Node, torch.Tensor]] = []

    def place(value: Any) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return [place(v) for v in value]
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"x{len(inputs)}")
        node.meta["val"] = value
        inputs.append((node, value))
        return node

    placed = [place(a) for a in args]
    node = graph.call_function(target, tuple(placed))
    whole = target(*args)
    node.meta["val"] = whole
    rule = find(target)
    assert isinstance(rule, Rowwise)
    dims = rule.dims(node)
    results = whole if isinstance(whole, (tuple, list)) else [whole]
    followed = 0
    for goes in range(results[0].dim()):
        size = results[0].shape[goes]
        along = {
            n: d for n, to in dims.items() for d, g in enumerate(to) if g == goes and n.meta["val"].shape[d] == size
        }
        if not along or size < 2:
            continue
        at = torch.tensor([size - 1, 0])
        local = {n: v.index_select(along[n], at) if n in along else v for n, v in inputs}
        found = target(*torch.fx.node.map_arg(placed, local.__getitem__))
        found = found if isinstance(found, (tuple, list)) else [found]
        for ours, theirs in zip(found, results):
            torch.testing.assert_close(ours, theirs.index_select(goes, at))
        followed += 1
    assert followed, "no dimension is followed"
