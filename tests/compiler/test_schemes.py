"""Quantization schemes: text, refusals, what is stored, and the bound on the rounding error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fuseline.compiler import clipping, ops
from fuseline.compiler.errors import UserError
from fuseline.compiler.formats import FORMATS
from fuseline.compiler.formats.element import Zeroless
from fuseline.compiler.formats.midrise import MidRise
from fuseline.compiler.schemes import KERNELS, Scheme
from tests.strategies import schemes

STORED = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64))
small = schemes(groups=(0, 2, 16))  # for weights [16, 64]
SPREADS = st.sampled_from((1e-30, 1e-3, 1.0, 50.0))


def stored(scheme: Scheme, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    parts = scheme.quantize(weight)
    return parts | {"codes": scheme.pack(parts["codes"])}


def restored(scheme: Scheme, weight: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The weight after quantization, from what is stored."""
    parts, group = stored(scheme, weight), scheme.group_of(weight.shape[-1])
    assert tuple(parts) == scheme.outputs
    codes, scale, zero = parts["codes"], parts["scale"], parts.get("zero")
    if scheme.format in KERNELS:
        return ops.dequantize(codes, scale, zero, scheme.bits, group, dtype)
    return ops.decode(codes, scale, zero, parts.get("outer"), scheme.format, group, True, dtype)


def groups_of(scheme: Scheme, values: torch.Tensor) -> torch.Tensor:
    """[groups, elements] of those that share a scale."""
    rows, (r, g) = values.shape[0], (scheme.rows or values.shape[0], scheme.group_of(values.shape[1]))
    return values.view(rows // r, r, -1, g).transpose(1, 2).reshape(-1, r * g)


@settings(max_examples=60)
@given(small, STORED, st.integers(0, 2**32 - 1), SPREADS, st.sampled_from((0.0, 1.0)))
def test_the_error_is_at_most_that_of_the_stated_step(
    scheme: Scheme, dtype: torch.dtype, seed: int, spread: float, offset: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = ((torch.randn(16, 64, generator=generator) + offset) * spread).to(dtype)
    back = restored(scheme, weight)
    error, values = (groups_of(scheme, t.double()) for t in (back - weight.double(), weight))
    if scheme.mse:  # a narrowed range cuts some and is better on the whole
        whole = groups_of(scheme, restored(replace(scheme, mse=False), weight) - weight.double())
        power = 2.5 if FORMATS[scheme.format].affine else 2
        cost, most = (e.abs().pow(power).sum(-1) for e in (error, whole))
        assert (cost <= most * (1 + 1e-3) + 1e-30).all()
        return
    assert (error.abs() <= bound(scheme, values)).all()


def bound(scheme: Scheme, values: torch.Tensor) -> torch.Tensor:
    """The largest error of each of groups [groups, elements], from what the documentation says of the format.

    Real scales are rounded to 8 bits or more, which moves the ends of the range by that much.
    """
    most, form = values.abs().amax(-1, keepdim=True), FORMATS[scheme.format]
    slack = most * 2**-7 + 1e-40
    if scheme.format in ("ternary", "binary"):  # half a step within the levels, and what lies beyond them
        mean = values.abs().mean(-1, keepdim=True)
        return torch.maximum(mean / (2 if scheme.format == "ternary" else 1), values.abs() - mean) + slack
    if isinstance(form.element, MidRise):  # levels a step apart around zero, and what lies beyond them
        step = 2 * values.abs().mean(-1, keepdim=True) / form.element.half
        return torch.maximum(step / 2, values.abs() - form.element.top * step) + slack
    if form.affine:
        low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
        step = most / (2 ** (scheme.bits - 1) - 1) if scheme.symmetric else (high - low) / (2**scheme.bits - 1)
        return step * (0.5 if scheme.symmetric else 1) + slack  # a rounded zero point clips up to half a step
    mantissa, exponent = form.element.mantissa, form.element.exponent
    relative = values.abs() * 2.0 ** -(mantissa + 1)
    tiny = most / form.element.top * 2.0 ** (1 - (2 ** (exponent - 1) - 1) - mantissa)  # a subnormal step
    if form.scaling == "e8m0":  # the scale is at most twice as coarse, and the top of the last binade is cut
        return (
            torch.maximum(
                torch.maximum(relative, tiny),
                values.abs()
                - most * form.element.top / 2 ** (torch.tensor(form.element.top).log2().floor().item() + 1),
            )
            + slack
        )
    if form.scaling == "e4m3":  # scales of three bits of mantissa, or steps of 2^-9 of the tensor's
        coarse = values.abs().max() / 448 / 6 * 2**-9
        return torch.maximum(relative, tiny) * (1 + 2**-3) + most * 2**-4 + 6 * coarse + slack
    return torch.maximum(relative, tiny) + slack


def test_a_narrowed_range_gives_up_an_outlier() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 6
    plain, narrowed = (restored(Scheme("int4", 0, symmetric=True, mse=mse), weight) for mse in (False, True))
    errors = [(back - weight).pow(2).mean() for back in (plain, narrowed)]
    assert errors[1] < 0.8 * errors[0] and narrowed[:, 0].max() < 6


@pytest.mark.parametrize("peak", [7.0, 1e-6])  # LLM-FP4's b₀ is 0.19 for the first: γ·b₀ alone would not move
def test_the_search_of_biases_moves_wherever_the_weights_lie(peak: float) -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    weight *= peak / weight.abs().amax(-1, keepdim=True)
    plain, searched = (restored(Scheme("e2m1", mse=mse), weight) for mse in (False, True))
    errors = [(back - weight).pow(2).mean() for back in (plain, searched)]
    assert errors[1] < 0.95 * errors[0]


@given(schemes(KERNELS), st.integers(0, 2**32 - 1))
def test_codes_that_kernels_read_survive_packing(scheme: Scheme, seed: int) -> None:
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


@settings(max_examples=40)
@given(small, STORED)
def test_groups_of_zeros_stay_zero(scheme: Scheme, dtype: torch.dtype) -> None:
    assert restored(scheme, torch.zeros(16, 64, dtype=dtype)).eq(0).all()
    weight = torch.randn(16, 64).to(dtype)
    weight[::2, :32] = 0
    zeros = groups_of(scheme, weight).eq(0).all(-1)
    assert groups_of(scheme, restored(scheme, weight))[zeros].eq(0).all()


@pytest.mark.parametrize("name", sorted(n for n, f in FORMATS.items() if not isinstance(f.element, Zeroless)))
def test_a_zero_among_others_stays_zero(name: str) -> None:
    weight = torch.randn(2, 64).abs()
    weight[:, 5] = 0
    assert restored(Scheme.parse(name, weights=True), weight)[:, 5].eq(0).all()


def test_constant_rows_and_one_sided_rows() -> None:
    for value in (3.0, -3.0):
        back = restored(Scheme("int4", 0, False), torch.full((1, 8), value))
        assert ((back - value).abs() <= 3 / 15 / 2 + 1e-6).all()


@settings(max_examples=40)
@given(small.filter(lambda s: s.symmetric), st.sampled_from((float("nan"), float("inf"), -float("inf"))), STORED)
def test_what_is_not_finite_makes_its_group_nan_and_no_other(scheme: Scheme, bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(16, 64).to(dtype)
    clean = groups_of(scheme, restored(scheme, weight))
    weight[3, 7] = bad
    spoiled = groups_of(scheme, weight).isfinite().logical_not().any(-1)
    back = groups_of(scheme, restored(scheme, weight))
    if scheme.format == "nvfp4":
        assert back.isnan().all()  # the tensor's own scale
        return
    assert spoiled.sum() == 1 and back[spoiled].isnan().all() and torch.equal(back[~spoiled], clean[~spoiled])


@settings(max_examples=40)
@given(small.filter(lambda s: s.symmetric and not s.mse and s.format not in KERNELS), STORED, st.booleans())
def test_finite_weights_stay_finite(scheme: Scheme, dtype: torch.dtype, large: bool) -> None:
    info = torch.finfo(dtype)
    weight = (
        torch.rand(16, 64).to(dtype) * info.max if large else torch.full((16, 64), info.tiny * info.eps, dtype=dtype)
    )
    weight[0, 0] = info.max if large else info.tiny
    assert restored(scheme, weight, dtype).isfinite().all()


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("int8", Scheme("int8", 0, True)), ("int4", Scheme("int4", 0, False)), ("int4:g64", Scheme("int4", 64, False)),
        ("int4:g64:sym", Scheme("int4", 64, True)), ("int8:channel:asym", Scheme("int8", 0, False)),
        ("int8:asym:g32", Scheme("int8", 32, False)), ("int3:g64", Scheme("int3", 64, False)),
        ("fp8", Scheme("e4m3")), ("fp6:tensor", Scheme("e3m2", rows=0)),
        ("fp4:b128:mse", Scheme("e2m1", 128, True, True, 128)),
        ("e3m0:g32", Scheme("e3m0", 32)), ("mxfp4", Scheme("mxfp4", 32)), ("mxfp8:g32", Scheme("mxfp8", 32)),
        ("nvfp4:mse", Scheme("nvfp4", 16, mse=True)), ("ternary:g64", Scheme("ternary", 64)),
        ("binary", Scheme("binary")),
    ],
)  # fmt: skip
def test_reading(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text, weights=True) == scheme


@given(schemes())
def test_printing_and_reading_are_inverses(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme), weights=True) == scheme
    if not scheme.mse and scheme.rows == 1:
        assert Scheme.parse(str(scheme), weights=False) == scheme


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int9", "unknown number format 'int9' in 'int9'; did you mean 'int"),
        ("mxfp5", "did you mean 'mxfp"), ("e8m9", "did you mean 'e"),
        ("int8:g", "unknown part 'g' in 'int8:g'"), ("int8:g0", "unknown part 'g0'"),
        ("int4:token", "unknown part 'token' in 'int4:token'"), ("int4:symm", "did you mean 'sym' or 'asym'"),
        ("fp8:asym", "e4m3 has no zero point; integers have one, such as int8:asym"),
        ("ternary:asym", "ternary has no zero point; integers have one, such as int2:asym"),
        ("mxfp4:g64", "mxfp4 has blocks of 32 channels\n  try: e2m1:g64"),
        ("nvfp4:channel", "nvfp4 has blocks of 16 channels"),
    ],
)  # fmt: skip
def test_unreadable_schemes_name_the_part_and_the_nearest(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Scheme.parse(text, weights=True)
    assert " ".join(message.split()) in " ".join(str(caught.value).split())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int8:b16", "unknown part 'b16'"), ("fp8:mse", "unknown part 'mse'"),
        ("int4:channel", "unknown part 'channel'"),
        ("int8:tensor:asym", "one scale for a tensor of activations has no zero point"),
    ],
)  # fmt: skip
def test_what_only_weights_have(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scheme.parse(text, weights=False)


def test_refusals() -> None:
    assert Scheme("int4", 128).refuse(576) == "group size 128 does not divide 576 (48, 64, 96, 144, 192 would)"
    assert Scheme("int8", 5).refuse(7) == "group size 5 does not divide 7"
    assert Scheme("int4").refuse(7) == "two 4-bit codes share a byte, and a group of 7 is odd"
    assert Scheme("int8").refuse(7) is None and Scheme("int4", 64).refuse(576) is None
    assert Scheme("mxfp4").refuse(48) == "mxfp4 has blocks of 32, which do not divide 48 (e2m1:g16 would)"
    assert Scheme("nvfp4").refuse(24) == "nvfp4 has blocks of 16, which do not divide 24"
    assert (
        Scheme("e4m3", 128, rows=128).refuse(256, 192) == "blocks of 128 rows do not divide 192 (b16, b32, b64 would)"
    )
    assert all(Scheme(name).refuse(7) is None for name in ("int3", "int5", "ternary", "binary", "e2m1"))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("channels", [32, 96])
def test_bytes_per_weight_count_scales_and_zero_points(name: str, symmetric: bool, channels: int) -> None:
    scheme = Scheme(name, 0, symmetric or not FORMATS[name].affine)
    parts = stored(scheme, torch.randn(16, channels))
    parts.pop("outer", None)
    measured = sum(t.numel() * t.element_size() for t in parts.values()) / (16 * channels)
    assert scheme.bytes_per_weight(channels) == pytest.approx(measured)


def test_shapes_are_asked_for_without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing evaluates expressions on fake tensors; a search would take as many steps there as on real ones."""

    def search(*args):
        raise AssertionError("searched")

    monkeypatch.setattr(clipping, "_search", search)
    scheme = Scheme("int4", 16, symmetric=True, mse=True)
    with FakeTensorMode():
        parts = scheme.quantize(torch.empty(8, 64))
    assert parts["codes"].shape == (8, 64) and parts["scale"].shape == (8, 4)
    with pytest.raises(AssertionError, match="searched"):
        scheme.quantize(torch.randn(8, 64))
