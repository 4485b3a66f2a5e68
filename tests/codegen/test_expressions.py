"""The text of pointwise expressions, and the reasons of those that cannot be written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fuseline.codegen.dtypes import cast, literal, pointer_type, rounded, triton_type
from fuseline.codegen.expressions import emit
from fuseline.codegen.kernel import Refusal
from tests.codegen.regions import region


def text(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> str | Refusal:
    """The last call's expression, its operands called a, b, c."""
    apart = [x.clone() for x in inputs]  # one tensor twice would be traced as one input
    nodes = [n for n in region(function, apart).graph.nodes if n.op == "call_function"]
    names = dict(zip(nodes[-1].all_input_nodes, "abc", strict=False))
    return emit(nodes[-1], names)


HALF = torch.randn(3, dtype=torch.bfloat16)
FULL = torch.randn(3)
WIDE = torch.randn(3, dtype=torch.float64)
INTEGER = torch.arange(3)


@pytest.mark.parametrize(
    "function, inputs, expected",
    [
        (lambda x, y: x + y, (HALF, HALF), "a + b"),
        (lambda x, y: torch.sub(x, y, alpha=2), (FULL, FULL), "a - b * 2.0"),
        (lambda x: 1 - x, (FULL,), "1.0 - a"),
        (lambda x, y: x / y, (FULL, FULL), "tl.div_rn(a, b)"),
        (lambda x, y: x / y, (WIDE, WIDE), "a / b"),
        (lambda x: x * 0.1, (WIDE,), "a * tl.full((), 0.1, tl.float64)"),
        (lambda x, k: x * k, (FULL, INTEGER), "a * b.to(tl.float32)"),
        (lambda x, y: x + y, (FULL, WIDE), "a.to(tl.float64) + b"),
        (lambda x: x.to(torch.bfloat16), (FULL,), "a.to(tl.bfloat16).to(tl.float32)"),
        (lambda x: x.float(), (HALF,), "a"),
        (lambda x: x.to(torch.float16), (WIDE,), "a.to(tl.float32).to(tl.float16).to(tl.float32)"),
        (lambda x: x.to(torch.bool), (FULL,), "(a != 0)"),
        (lambda x: x**2, (FULL,), "a * a"),
        (lambda k: k > 1.5, (INTEGER,), "a.to(tl.float32) > 1.5"),
        (lambda x: x.masked_fill(x > 0, float("-inf")), (FULL,), 'tl.where(b, float("-inf"), a)'),
    ],
)
def test_text(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], expected: str) -> None:
    assert text(function, *inputs) == expected


@pytest.mark.parametrize(
    "function, inputs, reason",
    [
        (lambda x: torch.erfinv(x), (FULL,), "is not a pointwise op the emitter knows"),
        (lambda x: x**13.5, (FULL,), "exponent 13.5 on torch.float32"),
        (lambda x, y: torch.div(x, y, rounding_mode="floor"), (FULL, FULL), "floor division of floating-point numbers"),
        (lambda x: x.to(torch.complex64), (FULL,), "kernels do not hold torch.complex64"),
        (lambda x: x.to(torch.float8_e4m3fn), (FULL,), "kernels do not hold torch.float8_e4m3fn"),
    ],
)
def test_refusals(function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], reason: str) -> None:
    answer = text(function, *inputs)
    assert isinstance(answer, Refusal) and reason in answer.reason


def test_an_operand_that_the_kernel_does_not_have_is_refused() -> None:
    nodes = [n for n in region(lambda x, y: x + y, [FULL, FULL]).graph.nodes if n.op == "call_function"]
    answer = emit(nodes[-1], {})
    assert isinstance(answer, Refusal) and "is not available in the kernel" in answer.reason


def test_literals_have_exactly_their_type() -> None:
    assert literal(0.5, torch.float32) == "0.5"
    assert literal(-0.5, torch.float32) == "(-0.5)"
    assert literal(1e-42, torch.float32).startswith("tl.full((), 1")  # Triton would take it for a float64
    assert literal(1e39, torch.float32) == 'tl.full((), float("inf"), tl.float32)'
    assert literal(3, torch.int64) == "tl.full((), 3, tl.int64)"
    assert literal(True, torch.bool) == "tl.full((), 1, tl.int1)"
    assert literal(float("nan"), torch.float64) == 'tl.full((), float("nan"), tl.float64)'


def test_types() -> None:
    assert (triton_type(torch.bfloat16), pointer_type(torch.bool)) == ("tl.bfloat16", "*i1")
    assert cast("x", torch.bool, torch.float32) == "x.to(tl.float32)"
    assert rounded("x", torch.float32, torch.float32) == "x"
