"""Traits and emitters agree: what `fuse` may put into a region, codegen can write, and the other way round."""

from __future__ import annotations

import torch

from fuseline.codegen import creations, dialect_rows, emitter, expressions, rearrangements, rows
from fuseline.compiler import traits
from fuseline.compiler.ops import REGISTRY, Kind, rms_norm
from tests.codegen.regions import region

aten = torch.ops.aten


def dialect(kind: Kind) -> set[object]:
    return {op.overload for op in REGISTRY.values() if op.kind is kind}


def test_every_pointwise_op_has_an_expression_and_every_expression_a_trait() -> None:
    assert set(expressions.RULES) == traits.POINTWISE | dialect(Kind.POINTWISE)


def test_every_row_op_has_an_emitter_and_every_emitter_a_trait() -> None:
    assert set(emitter.ROW_RULES) == traits.REDUCTIONS | traits.NORMS | dialect(Kind.ROW)
    assert set(rows.RULES) == traits.REDUCTIONS
    assert set(dialect_rows.RULES) >= traits.NORMS


def test_every_rearrangement_and_creation_has_an_emitter() -> None:
    assert set(rearrangements.RULES) == traits.REARRANGEMENTS
    assert set(creations.RULES) == traits.CREATIONS


def test_kinds() -> None:
    assert traits.kind(aten.add.Tensor) is Kind.POINTWISE
    assert traits.kind(aten.softmax.int) is Kind.ROW
    assert traits.kind(rms_norm.overload) is Kind.ROW
    assert traits.kind(torch.ops.fuseline.attention.default) is Kind.ANCHOR
    assert traits.kind(aten.mm.default) is None
    assert traits.kind(aten.add_.Tensor) is None  # in place
    assert traits.is_view(aten.transpose.int) and not traits.is_view(aten.add.Tensor)


def test_a_reduction_is_a_row_op_over_the_last_dimension_alone() -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = x.sum(0), x.mean((0, 1)), x.sum(), x.softmax(0), torch.nn.functional.layer_norm(x, (4, 5))
        return x.sum(-1), x.amax(1), x.softmax(-1), torch.nn.functional.layer_norm(x, (5,)), *rest

    graph = region(function, [torch.randn(4, 5)]).graph
    kinds = [traits.kind(node) for node in next(iter(reversed(graph.nodes))).args[0]]
    assert kinds == [Kind.ROW] * 4 + [None] * 5


def test_arguments_have_names_and_defaults() -> None:
    graph = region(lambda x: torch.add(x, x, alpha=2).sum(-1), [torch.randn(4, 5)]).graph
    add, total = (node for node in graph.nodes if node.op == "call_function")
    assert traits.arguments(add)["alpha"] == 2
    assert traits.arguments(total) == {"self": add, "dim": [-1], "keepdim": False, "dtype": None}
