"""Quantization schemes: text, refusals, packing, and the bound on the rounding error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fuseline.compiler import clipping, ops
from fuseline.compiler.errors import UserError
from fuseline.compiler.schemes import Scheme
from tests.strategies import schemes

STORED = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def restored(scheme: Scheme, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight after quantization, in float64, and the scale of each of its elements."""
    parts = scheme.quantize(weight)
    group = scheme.group_of(weight.shape[-1])
    packed = scheme.pack(parts["codes"])
    back = ops.dequantize(packed, parts["scale"], parts.get("zero"), scheme.bits, group, torch.float64)
    return back, parts["scale"].double().repeat_interleave(group, -1)


@given(schemes, STORED, st.integers(0, 2**32 - 1), st.sampled_from((1e-3, 0.1, 1.0, 50.0)), st.sampled_from((0.0, 1.0)))
def test_the_error_is_at_most_half_a_step(
    scheme: Scheme, dtype: torch.dtype, seed: int, spread: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = ((torch.randn(3, 128, generator=generator) + offset) * spread).to(dtype)
    back, step = restored(scheme, weight)
    # A scale that is rounded to its stored type can shrink: the ends of the range then lie that much outside.
    kept = torch.finfo(dtype if dtype.itemsize == 2 else torch.float32)
    rounding = 2**scheme.bits * (step * kept.eps).clamp_min(kept.tiny * kept.eps)
    slack = step / 2 + rounding
    error = (back - weight.double()).abs()
    if not scheme.mse:
        assert (error <= slack).all()
        return
    whole, _ = restored(replace(scheme, mse=False), weight)  # a narrowed range cuts some and is better on the whole
    group = scheme.group_of(128)
    cost, most = (e.pow(2).unflatten(-1, (-1, group)).sum(-1) for e in (error, (whole - weight.double()).abs()))
    assert (cost <= most * (1 + 1e-3) + 1e-30).all()


def test_a_narrowed_range_gives_up_an_outlier() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 6
    plain, narrowed = (restored(Scheme(4, 0, symmetric=True, mse=mse), weight)[0] for mse in (False, True))
    errors = [(back - weight).pow(2).mean() for back in (plain, narrowed)]
    assert errors[1] < 0.8 * errors[0] and narrowed[:, 0].max() < 6


@given(schemes, st.integers(0, 2**32 - 1))
def test_codes_survive_packing(scheme: Scheme, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = 16 if scheme.bits == 4 else 256
    codes = torch.randint(0, top, (3, 128), generator=generator, dtype=torch.uint8)
    packed = scheme.pack(codes)
    assert packed.shape[-1] == codes.shape[-1] * scheme.bits // 8
    zero = torch.zeros(3, 128 // scheme.group_of(128), dtype=torch.uint8)
    back = ops.dequantize(packed, torch.ones(zero.shape), zero, scheme.bits, scheme.group_of(128), torch.float32)
    assert torch.equal(back, codes.float())


def test_the_layout_of_a_packed_group() -> None:
    packed = ops.pack_nibbles(torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.uint8), 4)
    assert packed.tolist() == [[0 | 2 << 4, 1 | 3 << 4, 4 | 6 << 4, 5 | 7 << 4]]


@pytest.mark.parametrize("text", ["int8", "int8:asym", "int4", "int4:sym", "int4:g2"])
def test_rows_of_zeros_stay_zero(text: str) -> None:
    weight = torch.zeros(2, 8)
    weight[1] = torch.linspace(-1, 2, 8)
    back, step = restored(Scheme.parse(text, weights=True), weight)
    assert back[0].eq(0).all() and step[0].eq(1).all()


def test_constant_rows_and_one_sided_rows() -> None:
    for value in (3.0, -3.0):
        back, step = restored(Scheme(4, 0, False), torch.full((1, 8), value))
        assert ((back - value).abs() <= step / 2 + 1e-6).all()


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int8", Scheme(8, 0, True)), ("int4", Scheme(4, 0, False)), ("int4:g64", Scheme(4, 64, False)),
        ("int4:g64:sym", Scheme(4, 64, True)), ("int8:channel:asym", Scheme(8, 0, False)),
        ("int8:asym:g32", Scheme(8, 32, False)),
    ],
)  # fmt: skip
def test_reading(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text, weights=True) == scheme


@given(schemes)
def test_printing_and_reading_are_inverses(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme), weights=True) == scheme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "unknown number format 'int5' in 'int5'; did you mean 'int"),
        ("int8:g", "unknown part 'g' in 'int8:g'"), ("int8:g0", "unknown part 'g0'"),
        ("int4:token", "unknown part 'token' in 'int4:token'"), ("int4:symm", "did you mean 'sym' or 'asym'"),
    ],
)  # fmt: skip
def test_unreadable_schemes_name_the_part_and_the_nearest(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Scheme.parse(text, weights=True)
    assert message in str(caught.value)


def test_refusals() -> None:
    assert Scheme(4, 128).refuse(576) == "group size 128 does not divide 576 (48, 64, 96, 144, 192 would)"
    assert Scheme(8, 5).refuse(7) == "group size 5 does not divide 7"
    assert Scheme(4).refuse(7) == "two 4-bit codes share a byte, and a group of 7 is odd"
    assert Scheme(8).refuse(7) is None and Scheme(4, 64).refuse(576) is None


def test_bytes_per_weight_count_scales_and_zero_points() -> None:
    for scheme in (Scheme(4, 64, False), Scheme(8, 0, True), Scheme(4, 32, True)):
        parts = scheme.quantize(torch.randn(16, 128))
        stored = [scheme.pack(parts["codes"]), parts["scale"], *([parts["zero"]] if "zero" in parts else [])]
        measured = sum(t.numel() * t.element_size() for t in stored) / (16 * 128)
        assert scheme.bytes_per_weight(128) == pytest.approx(measured)


def test_shapes_are_asked_for_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing evaluates expressions on fake tensors; a search would take as many steps there as on real ones."""

    def search(*args):
        raise AssertionError("searched")

    monkeypatch.setattr(clipping, "_search", search)
    scheme = Scheme(4, 16, symmetric=True, mse=True)
    with FakeTensorMode():
        parts = scheme.quantize(torch.empty(8, 64))
    assert parts["codes"].shape == (8, 64) and parts["scale"].shape == (8, 4)
    with pytest.raises(AssertionError, match="searched"):
        scheme.quantize(torch.randn(8, 64))
