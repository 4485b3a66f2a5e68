"""Ranges by half-quadratic splitting: never worse than where they start, and `quantize{method=hqq}` uses them."""

from __future__ import annotations

import torch
from hypothesis import given, settings, strategies as st

import fuseline
from fuseline import Pipeline
from fuseline.compiler.half_quadratic import POWER, half_quadratic
from fuseline.compiler.schemes import Scheme
from tests.helpers.models import Mlp, error
from tests.strategies import schemes


def objective(weight: torch.Tensor, other: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Σ|w − ŵ|^0.7 of each group."""
    return (weight - other).abs().pow(POWER).unflatten(-1, (-1, scheme.group_of(weight.shape[-1]))).sum(-1)


def quantized(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    groups, grid = scheme.grid(weight)
    scale, zero = half_quadratic(groups, grid, scheme.narrowed(weight))
    return ((grid.codes(groups, scale, zero) - zero) * scale).flatten(-2)


@settings(max_examples=25, deadline=None)
@given(schemes(("int4", "int8")).filter(lambda s: s.rows == 1), st.integers(0, 99), st.sampled_from((1e-4, 1.0, 100.0)))
def test_no_group_is_worse_than_rounded_to_nearest(scheme: Scheme, seed: int, size: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 64, generator=draw, dtype=torch.float64) * size
    weight[:, ::16] *= 5
    found = objective(weight, quantized(weight, scheme), scheme)
    nearest = objective(weight, scheme.rounded(weight, scheme.narrowed(weight)), scheme)
    assert (found <= nearest * (1 + 1e-9)).all()


def test_outliers_are_given_up_for_the_others() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256, dtype=torch.float64)
    weight[:, ::64] *= 4
    for scheme in (Scheme("int4", 64), Scheme("int4", 64, symmetric=False)):
        nearest = objective(weight, scheme.rounded(weight, 1.0), scheme).sum()
        scaled = objective(weight * 1e-5, quantized(weight * 1e-5, scheme), scheme).sum() * 1e5**POWER
        found = objective(weight, quantized(weight, scheme), scheme).sum()
        assert found < 0.96 * nearest
        assert abs(scaled - found) < 1e-3 * found  # whatever the weight's magnitude


def test_it_needs_no_data_and_follows_the_weight() -> None:
    pipeline = Pipeline("quantize{weights=int8,method=hqq}")
    assert not pipeline.needs_data
    model, x = Mlp(), torch.randn(3, 8)
    with torch.no_grad():
        program = fuseline.capture(model, (x,))
        after = pipeline.run(program, verification="full")[0].to_module()
        assert error(after(x), model(x)) < 0.02
        assert not torch.equal(after(x), Pipeline("quantize{weights=int8}").run(program)[0].to_module()(x))
        model.down.weight.mul_(-2)
        assert error(after(x), model(x)) < 0.02
