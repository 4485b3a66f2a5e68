"""Weight expressions: printing and reading are inverses; folds are computed in float64; sizes agree on fake tensors."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fuseline.compiler.errors import FuselineError
from fuseline.compiler.expressions import (
    GRAMMAR,
    Cast,
    Concat,
    Constant,
    Decode,
    Expression,
    Hadamard,
    HadamardCore,
    Matmul,
    Output,
    Pack,
    Param,
    Quantize,
    Reshape,
    Scale,
    Signs,
    Slice,
    Transpose,
    online_core,
)  # fmt: skip
from fuseline.compiler.hadamard import core, hadamard_matrix, random_signs
from fuseline.compiler.ops import hadamard
from fuseline.compiler.schemes import KERNELS, Scheme
from tests.strategies import expressions, names, schemes

A, B = Param("a"), Param("b")


@given(expressions())
def test_json_and_back(expression: Expression) -> None:
    assert Expression.from_json(json.loads(json.dumps(expression.to_json()))) == expression


@given(expressions(), st.dictionaries(names, names))
def test_renaming_reaches_every_parameter_and_nothing_else(expression: Expression, new: dict[str, str]) -> None:
    renamed = expression.rename(new)
    assert [type(e) for e in renamed.walk()] == [type(e) for e in expression.walk()]
    assert set(renamed.parameters()) == {new.get(name, name) for name in expression.parameters()}
    assert hash(expression.rename({})) == hash(expression) and expression.rename({}) == expression


def test_every_kind_of_the_grammar_is_drawn() -> None:
    drawn: set[str] = set()

    @settings(max_examples=400, database=None, derandomize=True)
    @given(expressions())
    def collect(expression: Expression) -> None:
        drawn.update(type(e).__name__.lower() for e in expression.walk())

    collect()
    assert drawn == set(GRAMMAR)


def test_an_unknown_kind_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(FuselineError, match="unknown weight expression 'rotate'") as caught:
        Expression.from_json({"op": "rotate"})
    assert "matmul" in str(caught.value)


def test_folds_are_computed_in_float64_and_rounded_once() -> None:
    # In float32 the sum would lose the small term: 1e8 + 1 − 1e8.
    a = torch.tensor([[1e8, 1.0, -1e8]])
    b = torch.ones(3, 1)
    assert Matmul(A, B).evaluate({"a": a, "b": b}.__getitem__).item() == 1.0
    low = a.bfloat16()
    assert Matmul(A, B).evaluate({"a": low, "b": b}.__getitem__).dtype == torch.bfloat16


TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor([1.0, 2.0, 3.0])}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (Cast(A, torch.float16), TENSORS["a"].half()),
        (Scale(A, B, 0), TENSORS["a"] * TENSORS["b"][:, None]),
        (Scale(Transpose(A, 0, 1), B, -1), TENSORS["a"].t() * TENSORS["b"]),
        (Slice(A, 1, 1, 3), TENSORS["a"][:, 1:3]),
        (Concat((A, Slice(A, 0, 0, 1)), 0), torch.cat((TENSORS["a"], TENSORS["a"][:1]))),
        (Reshape(A, (2, 6)), TENSORS["a"].reshape(2, 6)),
        (Hadamard(A, 1), (TENSORS["a"].double() @ hadamard_matrix(4)).float()),
        (Hadamard(A, -2), (hadamard_matrix(3) @ TENSORS["a"].double()).float()),
        (Hadamard(A, 1, 2), (TENSORS["a"].double() @ torch.block_diag(*[hadamard_matrix(2)] * 2)).float()),
        (HadamardCore(12, "cpu"), core(12)),
        (HadamardCore(12, "cpu", torch.float16), core(12).half()),
        (Signs(5, 3, torch.bfloat16, "cpu"), torch.tensor(random_signs(5, 3), dtype=torch.bfloat16)),
        (Constant((1, 2, 3, 4), (2, 2), torch.int64, "cpu"), torch.tensor([[1, 2], [3, 4]])),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, Expression) else "",
)
def test_meaning(expression: Expression, expected: torch.Tensor) -> None:
    actual = expression.evaluate(TENSORS.__getitem__)
    assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@settings(max_examples=40)
@given(schemes(groups=(0, 2, 16)))
def test_fake_values_have_the_shape_and_type_of_real_ones(scheme: Scheme) -> None:
    weight = torch.randn(32, 64)
    quantized = Quantize(Transpose(Cast(A, torch.bfloat16), 0, 1), scheme)
    parts = {name: Output(quantized, name) for name in scheme.outputs}
    parts["codes"] = Pack(parts["codes"], scheme)
    wanted = list(parts.values())
    if scheme.format not in KERNELS:
        more = parts.get("zero"), parts.get("outer"), scheme.format, scheme.group_of(32), True, torch.float16
        wanted.append(Decode(parts["codes"], parts["scale"], *more))
    with FakeTensorMode() as mode:
        fakes = [e.evaluate(lambda name: mode.from_tensor(weight)) for e in wanted]
    reals = [e.evaluate(lambda name: weight) for e in wanted]
    assert [(f.shape, f.dtype) for f in fakes] == [(r.shape, r.dtype) for r in reals]


def test_what_several_outputs_share_is_computed_once() -> None:
    calls = []

    def lookup(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.randn(2, 4)

    quantized, memo = Quantize(A, Scheme("int8")), {}
    Output(quantized, "codes").evaluate(lookup, memo)
    Output(quantized, "scale").evaluate(lookup, memo)
    assert calls == ["a"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "block"), [(0, 0), (1, 0), (1, 12), (0, 3)])
def test_a_rotation_undoes_itself_and_is_rounded_once(dtype: torch.dtype, dim: int, block: int) -> None:
    weight = torch.randn(6, 48, dtype=dtype)
    turned = Hadamard(Cast(A, torch.float64), dim, block)
    back = Cast(Hadamard(turned, dim - 2, block), dtype).evaluate({"a": weight}.__getitem__)
    assert back.is_contiguous() and torch.equal(back, weight) or (back - weight).abs().max() < 1e-14
    once = Hadamard(A, dim, block).evaluate({"a": weight}.__getitem__)
    assert torch.equal(once, turned.evaluate({"a": weight}.__getitem__).to(dtype))


@pytest.mark.parametrize("n", [64, 96, 94, 11008, 18944])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_with_its_own_core_is_the_expression(n: int, dtype: torch.dtype) -> None:
    dense, signs = online_core(n, dtype, "cpu")
    x = torch.randn(2, n, dtype=torch.float64)
    found = hadamard(x, None if dense is None else dense.evaluate({}.__getitem__), n, signs)
    assert (found - Hadamard(A, -1).evaluate({"a": x}.__getitem__)).abs().max() < 1e-12


def test_rotations_and_their_leaves_have_fake_values() -> None:
    for expression in (
        Hadamard(A, 0, 12),
        HadamardCore(47, "cpu", torch.float64),
        HadamardCore(28, "cpu"),
        Signs(7, 0, torch.half, "cpu"),
    ):
        weight = torch.randn(24, 4, dtype=torch.bfloat16)
        with FakeTensorMode() as mode:
            fake = expression.evaluate(lambda name: mode.from_tensor(weight))  # noqa: B023
        real = expression.evaluate(lambda name: weight)  # noqa: B023
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
