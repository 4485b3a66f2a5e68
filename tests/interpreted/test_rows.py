"""Reductions, softmax, norms and the dialect's row ops, against eager in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fuseline.compiler.ops import dequantize, glu, layer_norm, pack_nibbles, quantize, quantize_affine, rms_norm, rotary
from tests.codegen.regions import check, compare, emitted, loaded

REDUCTIONS = {
    "sum": lambda x: x.sum(-1),
    "sum_keepdim": lambda x: x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(-1),
    "amax": lambda x: x.amax(-1, keepdim=True),
    "amin": lambda x: x.amin(-1),
    "var": lambda x: x.var(-1),
    "var_biased": lambda x: x.var(-1, correction=0, keepdim=True),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "normalised": lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-3).sqrt(),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        check(REDUCTIONS[name], torch.randn(3, 5, 77).to(dtype), folder=tmp_path)
    check(REDUCTIONS[name], torch.randn(2, 64), folder=tmp_path)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_in_a_loop(name: str, tmp_path: Path) -> None:
    """Rows of symbolic length, and rows that no block holds; shifted, lest a long sum cancels to almost nothing."""
    others = [(0.5 + torch.randn(2, n),) for n in (2, 1000, 2048, 4100)]
    check(REDUCTIONS[name], 0.5 + torch.randn(3, 50), dynamic={0: (0, 1)}, run=others, folder=tmp_path)
    check(REDUCTIONS[name], 0.5 + torch.randn(2, 17000), folder=tmp_path)


def test_reductions_of_integers_and_truth_values(tmp_path: Path) -> None:
    k = torch.randint(-99, 99, (4, 37))
    check(lambda k: (k.sum(-1), k.amax(-1), k.to(torch.int8).amin(-1), (k > 0).sum(-1)), k, folder=tmp_path)
    check(lambda k: ((k > 90).amax(-1), (k.int() > -90).amin(-1, keepdim=True)), k, folder=tmp_path)


def test_reduction_of_one_dimension(tmp_path: Path) -> None:
    check(lambda x: x.sum(), torch.randn(130), folder=tmp_path)
    check(lambda x: x - x.mean(), torch.randn(130), folder=tmp_path)


def test_rows_without_columns(tmp_path: Path) -> None:
    check(lambda x: (x.sum(-1), x * 2), torch.randn(3, 0), folder=tmp_path)
    others = [(torch.randn(3, 0),), (torch.randn(0, 4),)]
    check(lambda x: (x.sum(-1), x * 2), torch.randn(3, 5), dynamic={0: (0, 1)}, run=others, folder=tmp_path)


def test_extrema_keep_what_is_not_a_number(tmp_path: Path) -> None:
    x = torch.randn(4, 100)
    x[0, 99], x[1, 0], x[2, 5] = float("nan"), float("inf"), -float("inf")
    check(lambda x: (x.amax(-1), x.amin(-1)), x, folder=tmp_path)
    check(lambda x: (x.amax(-1), x.amin(-1)), x, dynamic={0: (0, 1)}, folder=tmp_path)


def test_softmax_of_masked_rows(tmp_path: Path) -> None:
    def function(x: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x.masked_fill(~visible, float("-inf")), -1, dtype=torch.float32).to(x.dtype)

    visible = torch.rand(2, 3, 19) < 0.7
    visible[0, 0] = False  # nothing to see: not a number, as in PyTorch
    check(function, torch.randn(2, 3, 19), visible, folder=tmp_path)
    check(lambda x: torch.logsumexp(x, -1), torch.full((2, 4), float("-inf")), folder=tmp_path)


def test_softmax_backward(tmp_path: Path) -> None:
    def function(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._softmax_backward_data(g, torch.softmax(y, -1), -1, g.dtype)

    check(function, torch.randn(3, 40), torch.randn(3, 40), folder=tmp_path)


@pytest.mark.parametrize("unit_offset", (False, True))
@pytest.mark.parametrize("cast_first", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16, torch.float64))
def test_rms_norm(dtype: torch.dtype, cast_first: bool, unit_offset: bool, tmp_path: Path) -> None:
    for accumulate in (None, torch.float64 if dtype == torch.float64 else torch.float32):

        def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            wide = torch.float64 if accumulate is not None and x.dtype == torch.float64 else accumulate  # noqa: B023
            return rms_norm(x, w, 1e-6, unit_offset, wide, cast_first)

        launcher = emitted(function, torch.randn(2, 4, 96).to(dtype), torch.randn(96).to(dtype))
        call = loaded(launcher, tmp_path)
        compare(function, call, (torch.randn(2, 4, 96).to(dtype), torch.randn(96).to(dtype)))


def test_norms_without_weights_and_of_pytorch(tmp_path: Path) -> None:
    x, w, b = torch.randn(3, 70), torch.randn(70), torch.randn(70)
    check(lambda x: rms_norm(x, None, 1e-5), x, folder=tmp_path)
    check(lambda x: layer_norm(x, None, None, 1e-5), x, folder=tmp_path)
    check(lambda x, w: layer_norm(x, w, None, 1e-5), x, w, folder=tmp_path)
    check(lambda x, w, b: layer_norm(x, w, b, 1e-5), x + 100, w, b, folder=tmp_path, bound=1e-4)
    check(lambda x, w, b: F.layer_norm(x, (70,), w, b, 1e-3), x.double(), w.double(), b.double(), folder=tmp_path)
    check(lambda x, w: F.rms_norm(x, (70,), w, 1e-3), x, w, folder=tmp_path)
    check(lambda x: F.rms_norm(x, (70,)), x.double(), folder=tmp_path)


def test_norm_after_a_residual_sum_before_a_quantization(tmp_path: Path) -> None:
    """The whole front of a quantized layer: three results of different shapes from one launch."""

    def function(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x + r
        return h, *quantize(rms_norm(h, w, 1e-6), 8, 96)

    launcher = emitted(
        function, torch.randn(2, 5, 96), torch.randn(2, 5, 96), torch.randn(96), dynamic={0: (0, 1), 1: (0, 1)}
    )
    call = loaded(launcher, tmp_path)
    for shape in ((2, 5, 96), (1, 1, 96), (3, 70, 96)):
        x, r, w = torch.randn(shape), torch.randn(shape), torch.randn(96)
        h, codes, scale = call(x, r, w)
        assert torch.equal(h, x + r)
        same_codes(function(x, r, w)[1:], (codes, scale))


def same_codes(eager: tuple[torch.Tensor, ...], ours: tuple[torch.Tensor, ...]) -> None:
    """Equal but for values that lie, up to rounding, in the middle between two codes."""
    (codes, scale), (our_codes, our_scale) = eager, ours
    assert our_codes.dtype == torch.int8 and our_scale.dtype == scale.dtype
    assert torch.allclose(our_scale, scale, rtol=1e-5, atol=0)
    gap = (codes.int() - our_codes.int()).abs()
    assert gap.max() <= 1 and (gap > 0).sum() <= max(1, gap.numel() // 500)


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("group", (96, 32, 24))
def test_quantize(bits: int, group: int, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 4, 96).to(dtype)
        x[1, 2] = 0  # a group of zeros has scale 1
        call = loaded(emitted(lambda x: quantize(x, bits, group), x), tmp_path)
        codes, scale = call(x)
        expected = quantize(x, bits, group)
        assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("group", (96, 24))
def test_quantize_with_a_zero_point(bits: int, group: int, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = (torch.randn(3, 4, 96) + 1).to(dtype)
        x[1, 2], x[0, 0], x[2, 1] = 0, x[0, 0].abs(), -x[2, 1].abs()  # all zeros, and ranges that 0 is an end of
        call = loaded(emitted(lambda x: quantize_affine(x, bits, group), x), tmp_path)
        for found, expected in zip(call(x), quantize_affine(x, bits, group), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_quantize_groups_of_a_norm(tmp_path: Path) -> None:
    """A reduction over the row inside one over its groups."""

    def function(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return quantize(rms_norm(x, w, 1e-6), 8, 32)

    x, w = torch.randn(5, 128), torch.randn(128)
    same_codes(function(x, w), loaded(emitted(function, x, w), tmp_path)(x, w))


def test_glu_then_quantize(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gate, up = x.split(70, -1)
        return quantize(glu(gate, up, "silu"), 8, 70)

    x = torch.randn(4, 140)
    same_codes(function(x), loaded(emitted(function, x), tmp_path)(x))


@pytest.mark.parametrize("bits, zero", ((8, False), (8, True), (4, False), (4, True)))
def test_dequantize(bits: int, zero: bool, tmp_path: Path) -> None:
    top = 2**bits
    for group in (64, 16):
        codes = torch.randint(0, top, (6, 64), dtype=torch.uint8)
        packed = pack_nibbles(codes, group) if bits == 4 else codes if zero else (codes.int() - 128).to(torch.int8)
        scale = torch.rand(6, 64 // group) + 0.1
        zeros = torch.randint(0, top, scale.shape, dtype=torch.uint8)
        if zero:
            function = lambda c, s, z: dequantize(c, s, z, bits, group, torch.float32)  # noqa: B023
            check(function, packed, scale, zeros, folder=tmp_path)
        else:
            check(lambda c, s: dequantize(c, s, None, bits, group, torch.float32), packed, scale, folder=tmp_path)  # noqa: B023


def test_rotary(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 5, 16).to(dtype)
        angles = torch.randn(2, 5, 8).repeat(1, 1, 2)
        cos, sin = angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)
        check(lambda x, c, s: rotary(x, c, s), x, cos, sin, folder=tmp_path)


def test_rotary_of_normalised_heads(tmp_path: Path) -> None:
    """Query heads as they come from a projection: split, normalised, turned, transposed; sizes symbolic."""

    def function(x: torch.Tensor, w: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        heads = x.view(x.shape[0], x.shape[1], 3, 16)
        return rotary(rms_norm(heads, w, 1e-6).transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1))

    def inputs(batch: int, length: int) -> tuple[torch.Tensor, ...]:
        angles = torch.randn(batch, length, 16)
        return torch.randn(batch, length, 48), torch.randn(16), angles.cos(), angles.sin()

    dynamic = {0: (0, 1), 2: (0, 1), 3: (0, 1)}
    run = [inputs(1, 1), inputs(4, 3), inputs(1, 33)]
    launcher = check(function, *inputs(2, 5), dynamic=dynamic, run=run, folder=tmp_path)
    assert launcher.kernels[0].source.count("tl.sum(") == 1


def test_rotate_half_as_a_model_writes_it(tmp_path: Path) -> None:
    def function(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos + torch.cat((-second, first), -1) * sin

    check(function, torch.randn(2, 3, 4, 16), torch.randn(4, 16), torch.randn(4, 16), folder=tmp_path)


def test_norm_of_strided_rows(tmp_path: Path) -> None:
    x, w = torch.randn(4, 6, 32), torch.randn(32)
    others = [(torch.randn(32, 6, 4).permute(2, 1, 0), torch.randn(64)[::2]), (torch.randn(6, 32).expand(4, 6, 32), w)]
    check(lambda x, w: rms_norm(x, w, 1e-6) + x, x, w, run=others, folder=tmp_path)


def test_norm_of_a_mean_of_rows_reads_a_row_once(tmp_path: Path) -> None:
    source = (
        check(lambda x, w: rms_norm(x, w, 1e-6), torch.randn(4, 48), torch.randn(48), folder=tmp_path).kernels[0].source
    )
    assert source.count("tl.load(") == 2


@pytest.mark.parametrize("magnitude", [1e-42, 1e-36, 1e-30, 1.0, 1e30])
def test_codes_at_every_magnitude(magnitude: float, tmp_path: Path) -> None:
    """Exact ties among them: with a largest of 127 the scale is 1. Under 2^-140 codes may be zero."""
    ties = torch.tensor([[127.0, 0.5, 1.5, 2.5, -3.5, 126.5, -127.0, 0.0]])
    x = torch.cat([ties.repeat(1, 12), torch.randn(4, 96)]) * magnitude
    function = lambda x: quantize(x, 8, 96)
    codes, scale = loaded(emitted(function, x), tmp_path)(x)
    exact = function(x)
    if magnitude < 1e-40:
        assert ((codes * scale).double() - x.double()).abs().max() <= 2.0**-133
    else:
        assert torch.equal(codes, exact[0]) and torch.equal(scale, exact[1])
