"""GPTQ on matrices: equal to a reference written column by column, never worse than rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fuseline.compiler.schemes import Scheme
from fuseline.passes.calibrated.gptq import Rounded, gptq
from tests import strategies  # noqa: F401  (the profile)


def problem(seed: int, rows: int, channels: int, samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs [samples, channels] that are correlated and of uneven size, in float64."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    mixing = normal(channels, channels) / channels**0.5 + 2 * normal(channels, 1) @ normal(1, channels) / channels
    return normal(rows, channels), normal(samples, channels) @ mixing * normal(channels).exp()


def hessian(x: torch.Tensor) -> torch.Tensor:
    return 2 * x.T @ x


def lost(x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The squared error of the products, a row of the weight each."""
    return (x @ (weight - other).T).square().sum(0)


def naive(
    weight: torch.Tensor, h: torch.Tensor, scheme: Scheme, damp: float, static: bool, order: bool
) -> torch.Tensor:
    """GPTQ by its formulas, one column after the other, with the inverse shrunk by elimination: no Cholesky, no blocks.

    Removing the unknown i from an inverse Hessian P leaves P − Pᵢᵀ·Pᵢ / Pᵢᵢ (Frantar et al., 2022, equation 4); the
    columns left take −e·Pᵢ / Pᵢᵢ, with e what the rounding of column i lost.
    """
    n, group, left = weight.shape[1], scheme.group_of(weight.shape[1]), weight.clone()
    diagonal = h.diagonal()
    mean = diagonal[diagonal > 0].mean()
    extra = torch.where(diagonal > 0, damp * mean, mean)
    inverse = torch.linalg.inv(h + torch.diag(extra))
    places = torch.argsort(diagonal, descending=True, stable=True).tolist() if order else list(range(n))
    ranges, result = {}, torch.empty_like(weight)
    for i in places:
        first = i // group * group
        if first not in ranges:
            ranges[first] = range_of((weight if static else left)[:, first : first + group], scheme)
        scale, zero = ranges[first]
        ends = (-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1) if scheme.symmetric else (0, 2**scheme.bits - 1)
        result[:, i] = ((left[:, i] / scale + zero).round().clamp(*ends) - zero) * scale
        left -= torch.outer((left[:, i] - result[:, i]) / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return result


def range_of(columns: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    if scheme.symmetric:
        scale = (columns.abs().amax(1) / (2 ** (scheme.bits - 1) - 1)).float().double()
        return scale, torch.zeros_like(scale)
    low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
    scale = ((high - low) / (2**scheme.bits - 1)).float().double()
    return scale, (-low / scale).round()


schemes = st.builds(Scheme, st.sampled_from(("int4", "int8")), st.sampled_from((0, 8, 24, 48, 96)), st.booleans())


@settings(max_examples=30)
@given(schemes, st.integers(0, 999), st.integers(1, 6), st.integers(1, 2), st.sampled_from((20, 400)), st.data())
def test_it_is_the_reference_where_that_is_better_than_rounding_to_nearest(
    scheme: Scheme, seed: int, rows: int, count: int, samples: int, data: st.DataObject
) -> None:
    weight, x = problem(seed, rows, 96 * count, samples)
    static = data.draw(st.booleans())
    order = static and data.draw(st.booleans())
    found = gptq(weight, hessian(x), scheme, 0.01, static, order)
    nearest = scheme.rounded(weight, 1.0)
    reference = naive(weight, hessian(x), scheme, 0.01, static, order)
    better = lost(x, weight, reference) < lost(x, weight, nearest)
    expected = torch.where(better[:, None], reference, nearest)
    # A value on the boundary of two codes may fall to either side, and then all behind it differs.
    same = ((found.matrix - expected).abs().amax(1) < 1e-6 * weight.abs().max()).sum()
    assert same >= rows - 1
    assert (lost(x, weight, found.matrix) <= lost(x, weight, nearest) * (1 + 1e-9)).all()
    assert torch.allclose(lost(x, weight, found.matrix) * 2, found.found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("group", [0, 8, 100, 128, 192, 256])
def test_blocks_of_any_group_size(group: int) -> None:
    """The columns that a group's scale is taken from are up to date, whether it begins a block or lies in one."""
    channels = {100: 300, 192: 384, 256: 512}.get(group, 256)
    weight, x = problem(group, 3, channels, 300)
    scheme = Scheme("int4", group)
    found, reference = gptq(weight, hessian(x), scheme).matrix, naive(weight, hessian(x), scheme, 0.01, False, False)
    assert (found - reference).abs().max() < 1e-6


def mean_gain(found: Rounded) -> float:
    return (found.found.sum() / found.nearest.sum()).item()


def test_correlated_inputs_lose_much_less() -> None:
    weight, x = problem(0, 32, 96, 400)
    scheme = Scheme("int4", 24)
    plain = gptq(weight, hessian(x), scheme)
    assert mean_gain(plain) < 0.7
    assert mean_gain(gptq(weight, hessian(x), scheme, static=True, order=True)) < mean_gain(plain)
    assert mean_gain(gptq(weight, torch.eye(96, dtype=torch.float64), scheme)) == 1.0  # nothing to make up for


def test_channels_that_are_zero_throughout_are_rounded_to_nearest() -> None:
    weight, x = problem(1, 8, 48, 200)
    x[:, [3, 20, 21]] = 0
    scheme = Scheme("int4", 24)
    found = gptq(weight, hessian(x), scheme, static=True)
    assert torch.equal(found.matrix[:, [3, 20, 21]], scheme.rounded(weight, 1.0)[:, [3, 20, 21]])
    assert mean_gain(found) < 0.6
    nothing = gptq(weight, torch.zeros(48, 48, dtype=torch.float64), scheme)
    assert torch.equal(nothing.matrix, scheme.rounded(weight, 1.0))


def test_fewer_samples_than_channels_is_damped() -> None:
    weight, x = problem(2, 8, 96, 5)
    found = gptq(weight, hessian(x), Scheme("int4", 24), damp=0.01)
    assert found.damp == 0.01 and mean_gain(found) < 0.2
    indefinite = hessian(x) - 0.05 * hessian(x).diagonal().mean() * torch.eye(96, dtype=torch.float64)
    indefinite.diagonal().clamp_(min=1e-9)
    assert gptq(weight, indefinite, Scheme("int4", 24), damp=0.01).damp == pytest.approx(0.1)
    with pytest.raises(ArithmeticError, match="not positive definite"):
        gptq(weight, -hessian(x) * 1e6, Scheme("int4", 24), damp=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types(dtype: torch.dtype) -> None:
    weight, x = problem(3, 8, 48, 200)
    weight = weight.to(dtype)
    found = gptq(weight, hessian(x), Scheme("int4", 24, symmetric=False))
    assert found.matrix.dtype == dtype and mean_gain(found) < 0.7
    assert found.parts["codes"].dtype == torch.uint8 and found.parts["zero"].dtype == torch.uint8
