"""Routed experts in `quantize`: what is refused, with a reason that says what to do instead."""

from __future__ import annotations

import pytest
import torch

import fuseline
from fuseline.compiler import ops
from fuseline.compiler.errors import UserError
from tests.codegen.moe_cases import Case, Layer

CASE = Case("layer", width=32, inner=32)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("weights=int4:g16,method=gptq", "method=rtn or method=hqq for experts"),
        ("weights=int8,activations=int8:token", "round their weights in a quantize without activations"),
        ("weights=int4:g24", "24 does not divide 32"),
    ],
)
def test_experts_are_refused_with_a_reason(options: str, told: str) -> None:
    """They stay as they are."""
    layer, x = Layer(CASE).eval(), torch.randn(9, 32)
    pipeline = fuseline.Pipeline(f"quantize{{{options},allow_empty}}")
    plan = fuseline.analyze(layer, pipeline, [x, x + 1]) if pipeline.needs_data else None
    with torch.no_grad():
        program, report = pipeline.run(fuseline.capture(layer, (x,)), plan=plan)
    reasons = report["quantize"].refused
    assert any(told in reason for reason in reasons.values()), reasons
    (node,) = [n for n in program.graph.nodes if n.target is ops.moe.overload]
    assert all(node.args[i].op == "get_attr" for i in (3, 4))


def test_training_through_rounded_experts_is_refused() -> None:
    with pytest.raises(UserError, match="experts are not trained through their rounding") as caught:
        fuseline.prepare_qat(Layer(CASE), "quantize{weights=int4:g16,skip=router}", torch.randn(9, 32))
    assert "skip=" in str(caught.value)
