"""Number formats: their numbers against the definition, the nearest of them against all, packing, block scales."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fuseline.compiler import ops
from fuseline.compiler.formats import FORMATS, Element, Integer, bits
from fuseline.compiler.formats.floating import Float
from fuseline.compiler.formats.midrise import MidRise
from fuseline.compiler.formats.scales import halfway
from fuseline.compiler.schemes import Scheme
from tests.strategies import schemes

INF, NAN = math.inf, math.nan
ELEMENTS = {f.element.name: f.element for f in FORMATS.values()}
ELEMENTS |= {f"{n}:asym": Integer(e.bits, False) for n, e in ELEMENTS.items() if isinstance(e, Integer)}
elements = st.sampled_from(sorted(ELEMENTS)).map(ELEMENTS.__getitem__)
named = pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)


def numbers(element: Element) -> list[float]:
    """The numbers of an element by its definition, by their code where codes are unsigned."""
    if isinstance(element, Integer):
        low = -(2 ** (element.bits - 1)) if element.symmetric else 0
        return [low + q for q in range(2**element.bits)]
    if isinstance(element, MidRise):
        return [k + 0.5 - 2 ** (element.bits - 1) for k in range(2**element.bits)]
    if not isinstance(element, Float):
        return {"ternary": [-1, 0, 1], "binary": [-1, 1]}[element.name]
    found = []
    for code in range(2 ** (element.bits - 1)):
        e, m = divmod(code, 2**element.mantissa)
        steps, exponent = (m, 1) if e == 0 else (2**element.mantissa + m, e)
        found.append(steps * 2.0 ** (exponent - (2 ** (element.exponent - 1) - 1) - element.mantissa))
    if element.name == "e4m3":
        found = found[:-1]
    if element.name == "e5m2":
        found = found[:-4]
    return found + [-x for x in found]


def codes_of(element: Element) -> torch.Tensor:
    """Every code that is a finite number."""
    if element.stored == torch.int8:
        return torch.arange(-128, 128).to(torch.int8)
    count = {"ternary": 3}.get(element.name, 2**element.bits)
    codes = torch.arange(count, dtype=torch.uint8)
    if not element.stored.is_floating_point:
        return codes
    codes = codes.view(element.stored)
    return codes[codes.float().isfinite()]


@named
def test_codes_stand_for_the_numbers_of_the_definition(element: Element) -> None:
    codes = codes_of(element)
    made = element.numbers(codes, torch.float64)
    assert made.tolist() == numbers(element) and made.max() == element.top
    again = element.codes(made)
    assert again.dtype == codes.dtype == element.stored
    back = element.numbers(again, torch.float64)
    assert torch.equal(back, made) and torch.equal(back.signbit(), made.signbit())


def test_the_numbers_of_named_formats() -> None:
    assert numbers(ELEMENTS["e2m1"])[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # OCP MX 1.0, table 5
    tops = {name: ELEMENTS[name].top for name in ("e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "e3m0")}
    assert tops == {"e4m3": 448, "e5m2": 57344, "e3m2": 28, "e2m3": 7.5, "e2m1": 6, "e3m0": 16}
    assert [FORMATS[n].element.name for n in ("mxfp8", "mxfp6", "mxfp4", "nvfp4")] == ["e4m3", "e3m2", "e2m1", "e2m1"]


@settings(max_examples=300)
@given(elements, st.floats(-1.3, 1.3), st.booleans(), st.sampled_from((torch.float32, torch.float64)))
def test_the_nearest_number(element: Element, part: float, between: bool, dtype: torch.dtype) -> None:
    grid = sorted(set(numbers(element)))
    x = torch.tensor(part * element.top, dtype=dtype)
    if between:  # exactly half way between two numbers
        at = min(int(abs(part) / 1.3 * (len(grid) - 1)), len(grid) - 2)
        x = torch.tensor((grid[at] + grid[at + 1]) / 2, dtype=dtype)
    found = element.nearest(x.view(1)).item()
    distance = min(abs(x.item() - number) for number in grid)
    assert found in grid and abs(x.item() - found) == pytest.approx(distance, rel=1e-6, abs=1e-12)
    if between and isinstance(element, Float):
        code = element.codes(torch.tensor([found], dtype=dtype)).view(torch.uint8).item()
        assert code % 2 == 0


@settings(max_examples=100)
@given(elements, st.integers(1, 70), st.integers(0, 2**32 - 1))
def test_codes_survive_packing(element: Element, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    every = codes_of(element)
    codes = every[torch.randint(0, len(every), (3, n), generator=generator)]
    packed = element.pack(codes)
    assert packed.shape == (3, element.packed_bytes(n)) and packed.dtype.itemsize == 1
    assert element.packed_bytes(n) == math.ceil(n / 5 if element.name == "ternary" else n * element.bits / 8)
    assert torch.equal(element.unpack(packed, n).view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("width", range(1, 8))
def test_dense_rows_are_little_endian_words(width: int) -> None:
    codes = torch.randint(0, 2**width, (2, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = bits.pack(codes, width)
    for row, words in zip(codes.tolist(), packed.contiguous().view(torch.int32).tolist(), strict=True):
        assert len(words) == width  # 32 codes in as many words as a code has bits
        stream = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
        assert [stream >> width * j & 2**width - 1 for j in range(32)] == row


def test_five_ternary_codes_share_a_byte() -> None:
    element = ELEMENTS["ternary"]
    packed = element.pack(torch.tensor([[2, 0, 1, 2, 1, 2]], dtype=torch.uint8))
    assert packed.tolist() == [[2 + 0 * 3 + 1 * 9 + 2 * 27 + 1 * 81, 2]]
    assert element.pack(torch.full((1, 5), 2, dtype=torch.uint8)).tolist() == [[242]]


def restored(x: torch.Tensor, name: str, group: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    codes, scale = ops.encode(x, name, group)
    return ops.decode(codes, scale, None, None, name, group or x.shape[-1], False, dtype or x.dtype)


RUN = sorted(FORMATS)
groups = st.sampled_from((0, 16, 32, 64))


@settings(max_examples=100)
@given(st.sampled_from(RUN), groups, st.integers(0, 2**32 - 1), st.sampled_from((1e-20, 1.0, 1e4)))
def test_rounding_twice_is_rounding_once(name: str, group: int, seed: int, spread: float) -> None:
    """With the same scale; and of formats whose largest number is kept, from the rounded numbers alone."""
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(seed)) * spread
    codes, scale = ops.encode(x, name, group)
    shape, whole = (-1, group or x.numel()), scale.view(-1, 1)
    once = restored(x, name, group)
    element = FORMATS[name].element
    assert torch.equal(element.rounded(once.view(shape), whole, torch.zeros_like(whole)), once.view(shape))
    if name in ("ternary", "nvfp4") or "midrise" in name:  # a mean, or the step of E4M3, changes with what was rounded
        return
    twice = restored(once, name, group)
    assert torch.allclose(twice, once, rtol=1e-6, atol=0)  # real scales may move by their last bit


@settings(max_examples=100)
@given(st.sampled_from(RUN), groups, st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)))
def test_values_of_the_run_are_rounded_as_weights(name: str, group: int, dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    group = FORMATS[name].group or group
    codes, scale = ops.encode(x, name, group)
    assert codes.dtype == FORMATS[name].element.stored and codes.shape == x.shape
    assert scale.shape == ((4, 64 // group) if group else (1, 1))
    assert scale.dtype == torch.promote_types(dtype, torch.float32)
    if name == "nvfp4" or dtype == torch.bfloat16 and FORMATS[name].scaling == "real":
        return  # a token's own outer scale; a weight's scale in 16 bits
    wanted = Scheme(name, group, rows=1 if group else 0).rounded(x.float() if dtype == torch.float16 else x, 1.0)
    assert torch.allclose(restored(x, name, group), wanted.to(dtype), rtol=1e-6)


def test_tokens_do_not_depend_on_each_other() -> None:
    x = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    for name in RUN:
        apart = torch.cat([restored(row, name, FORMATS[name].group or 64) for row in x.split(1)])
        assert torch.equal(restored(x, name, FORMATS[name].group or 64), apart), name


@pytest.mark.parametrize("name", RUN)
def test_what_is_not_finite_makes_its_group_nan(name: str) -> None:
    group = FORMATS[name].group or 32
    for bad in (NAN, INF, -INF):
        x = torch.randn(3, 64)
        clean = restored(x, name, group)
        x[1, 40] = bad
        back = restored(x, name, group)
        first = 0 if name == "nvfp4" else 40 // group * group
        last = 64 if name == "nvfp4" else first + group
        assert back[1, first:last].isnan().all()
        back[1, first:last] = clean[1, first:last]
        assert torch.equal(back, clean)


def inexact(name: str) -> bool:
    """Whether a group of equal values is not one of the format's numbers at its default range."""
    return name == "int2" or name.startswith("midrise")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", RUN)
def test_extremes_and_denormals_stay_finite(name: str, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (info.max, -info.max, info.tiny, info.tiny * info.eps, 0.0):
        x = torch.full((2, 64), value, dtype=dtype)
        back = restored(x, name, FORMATS[name].group or 64)
        assert back.isfinite().all()
        if value == 0:
            assert back.eq(0).all()
        elif abs(value) >= info.tiny * 2**6 and FORMATS[name].scaling == "real" and not inexact(name):
            assert torch.allclose(back.double(), x.double(), rtol=2**-7)


@pytest.mark.parametrize(("name", "native"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fp8_is_the_cast_of_torch(name: str, native: torch.dtype, dtype: torch.dtype) -> None:
    top = ELEMENTS[name].top
    x = (torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.randint(-18, 6, (64, 64))).to(
        dtype
    )
    x[:, 0] = top  # the scale is then 1
    codes, scale = ops.encode(x.clamp(-top, top), name, 64)
    assert codes.dtype == native and scale.eq(1).all()
    assert torch.equal(codes.view(torch.uint8), x.clamp(-top, top).to(native).view(torch.uint8))


def test_mxfp_scales_follow_the_specification() -> None:
    """X = 2^(⌊log₂ max⌋ − emax), elements saturate: OCP Microscaling Formats 1.0, section 6.3; twice that where the
    largest is nearer to the next power of two than to the last number."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.randint(-140, 120, (64, 1))
    x[0, :32] = 0
    for name, largest in (("mxfp4", 2), ("mxfp6", 4), ("mxfp6_e2m3", 2), ("mxfp8", 8), ("mxfp8_e5m2", 15)):
        parts = Scheme(name).quantize(x)
        grid = torch.tensor(sorted(set(numbers(FORMATS[name].element))), dtype=torch.float64)
        back = ops.decode(Scheme(name).pack(parts["codes"]), parts["scale"], None, None, name, 32, True, torch.float64)
        for block, byte, rounded in zip(x.view(-1, 32), parts["scale"].flatten(), back.view(-1, 32), strict=True):
            most = block.abs().max().item()
            part, power = math.frexp(most)
            power += part >= halfway(FORMATS[name].element.top)
            exponent = max(-127, min(127, power - 1 - largest)) if most else 0
            assert byte == exponent + 127
            distance = (rounded - block.double()).abs() / 2.0**exponent
            assert torch.equal(distance, (block.double()[:, None] / 2.0**exponent - grid).abs().amin(-1))


def test_nvfp4_has_e4m3_scales_and_one_for_the_tensor() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    parts = Scheme("nvfp4").quantize(x)
    outer = x.abs().max() / (448 * 6)
    assert torch.equal(parts["outer"], outer.view(1)) and parts["scale"].dtype == torch.float8_e4m3fn
    wanted = (x.view(8, 4, 16).abs().amax(-1) / 6 / outer).clamp(max=448).to(torch.float8_e4m3fn)
    assert torch.equal(parts["scale"].float(), wanted.float()) and parts["scale"].float().max() == 448


def test_ternary_and_binary_follow_their_rules() -> None:
    x = torch.tensor([[0.9, -0.1, 0.0, -1.4], [2.0, 2.0, -2.0, 0.0]])
    assert torch.allclose(restored(x, "ternary", 4), torch.tensor([[0.6, 0, 0, -0.6], [1.5, 1.5, -1.5, 0]]))
    assert torch.allclose(restored(x, "binary", 4), torch.tensor([[0.6, -0.6, 0.6, -0.6], [1.5, 1.5, -1.5, 1.5]]))


@given(schemes(sorted(n for n, f in FORMATS.items() if isinstance(f.element, Float))))
@settings(max_examples=20)
def test_a_real_bias_is_a_real_scale(scheme: Scheme) -> None:
    """LLM-FP4's rounding with bias b = c − log₂ s, written as in its equations."""
    element = scheme.element
    assert isinstance(element, Float)
    x = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(scheme.group))
    scale = x.abs().max() / element.top
    b = element.bias - torch.log2(scale)
    step = 2.0 ** ((torch.floor(torch.log2(x.abs()) + b)).clamp(min=1) - element.mantissa - b)
    top = 2.0 ** (math.log2(element.top) + element.bias - b)
    wanted = (step * torch.round(x / step)).clamp(-top, top)
    zero = torch.zeros(1, dtype=torch.float64)
    assert torch.allclose(element.rounded(x, scale.view(1), zero), wanted, rtol=1e-12)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e5m2"])
def test_microscaling_is_torchao_s(name: str) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    element = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8_e5m2": torch.float8_e5m2}[name]
    even = mx.ScaleCalculationMode.EVEN
    peer = mx.MXTensor.to_mx(x, element, block_size=32, scaling_mode=even).dequantize(torch.float32)
    assert torch.equal(restored(x, name, 32), peer)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp6_e2m3", "mxfp4"])
def test_a_block_ends_where_its_largest_number_is_nearest(name: str) -> None:
    top = FORMATS[name].element.top
    power = 2.0 ** (math.floor(math.log2(top)) + 1)
    middle = (top + power) / 2
    for largest, scale in ((top, 1), (middle * 0.999, 1), (middle, 2), (power * 0.999, 2), (power, 2), (1e-39, None)):
        block = torch.full((1, 32), largest)
        exponent = Scheme(name, 32).quantize(block)["scale"].item() - 127
        assert scale is None or 2.0**exponent == scale
        assert (restored(block, name, 32) - block).abs().max() <= (power - top) / 2 * 2.0**exponent + 1e-38


def test_nvfp4_is_torchao_s() -> None:
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    peer = nv.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=x.abs().max() / (448 * 6)).dequantize(torch.float32)
    assert (Scheme("nvfp4").rounded(x, 1.0) - peer).abs().max() <= 1e-6 * x.abs().max()


def test_dense_integers_are_compressed_tensors() -> None:
    try:
        packing = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    except ImportError:
        pytest.skip("compressed-tensors with dense packing is not installed")
    codes = torch.randint(-4, 4, (4, 64), dtype=torch.int8)
    words = packing.pack_to_int32(codes, 3)
    if words.shape[-1] != 64 * 3 // 32:
        pytest.skip("this compressed-tensors leaves bits unused")
    assert torch.equal(words.view(torch.uint8), bits.pack((codes + 4).to(torch.uint8), 3))
