"""`fuseline::fake_quantize` and `round_through`: values against `Scheme`, gradients against ParetoQ's formulas."""

from __future__ import annotations

import math

import pytest
import torch

from fuseline.compiler.formats import FORMATS
from fuseline.compiler.formats.learned import initial_range, learned
from fuseline.compiler.ops import decode, fake_quantize, round_through
from fuseline.compiler.schemes import Scheme

LSQ, SEQ = ("int2", "int3", "int4", "int8"), ("midrise2", "midrise3", "midrise4", "ternary")


def start(x: torch.Tensor, format: str, group: int) -> torch.Tensor:
    return initial_range(x.detach().unflatten(-1, (-1, group)), FORMATS[format].element).squeeze(-1)


def published(x: torch.Tensor, alpha: torch.Tensor, grad: torch.Tensor, format: str):
    """ParetoQ's ŵ, dw and dα for rows of x, written from its formulas (its w_bits 0 is ternary)."""
    bits = {"ternary": 0, "binary": 1}.get(format) if format in ("ternary", "binary") else int(format[-1])
    most = 2 ** (bits - 1) - 1 if bits > 1 else 1
    factor, ratio = 1 / math.sqrt(x.numel() * most), x / alpha
    if format == "binary":
        inside = ratio.abs() <= 1
        return alpha * x.sign(), inside * grad, (x.sign() * grad).sum(-1, keepdim=True) * factor
    if format in LSQ:
        low, high = -(2 ** (bits - 1)), most
        rounded = ratio.round().clamp(low, high)
        inside, ends = (ratio >= low) & (ratio <= high), (ratio < low) * low + (ratio > high) * high
    else:
        levels, shift = (1.5, 0.0) if bits == 0 else (2 ** (bits - 1), 0.5)
        rounded = ((ratio.clamp(-0.99, 0.99) * levels - shift).round() + shift) / levels
        inside, end = ratio.abs() <= 0.99, (levels - shift) / levels
        ends = (ratio > 0.99) * end - (ratio < -0.99) * end
    of_alpha = torch.where(inside, rounded - ratio, ends) * grad
    return alpha * rounded, inside * grad, of_alpha.sum(-1, keepdim=True) * factor


@pytest.mark.parametrize("part", (1.0, 0.6))
@pytest.mark.parametrize("format", (*LSQ, *SEQ, "binary"))
def test_values_and_gradients_are_paretoqs(format: str, part: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 40, dtype=torch.float64, requires_grad=True)
    alpha = (part * start(x, format, 40)).requires_grad_()
    grad = torch.randn(6, 40, dtype=torch.float64)
    made = fake_quantize(x, alpha, format, 40)
    made.backward(grad)
    value, of_x, of_alpha = published(x.detach(), alpha.detach().double(), grad, format)
    assert (made - value).abs().max() < 1e-6
    assert torch.equal(x.grad, of_x)
    assert (alpha.grad - of_alpha).abs().max() < 1e-6 * of_alpha.abs().max()


def test_initial_ranges() -> None:
    x = torch.randn(3, 32)
    largest, mean = x.abs().amax(-1, keepdim=True), x.abs().mean(-1, keepdim=True)
    wanted = {"int4": largest / 7, "int3": largest / 3, "midrise2": largest, "ternary": largest, "binary": mean}
    for format, range in wanted.items():
        assert torch.allclose(start(x, format, 32), range), format
    assert learned(FORMATS["e2m1"].element) is None


def test_levels() -> None:
    """2 bits: ¼ and ¾ of the range; ternary: ⅔."""
    x = torch.linspace(-1, 1, 64).view(1, -1)
    two, three = (fake_quantize(x, torch.ones(1, 1), f, 64).unique() for f in ("midrise2", "ternary"))
    assert two.tolist() == [-0.75, -0.25, 0.25, 0.75]
    assert torch.allclose(three, torch.tensor([-2 / 3, 0, 2 / 3]))


@pytest.mark.parametrize("group", (8, 32))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("format", (*LSQ, *SEQ, "binary"))
def test_training_sees_what_codes_stand_for(format: str, dtype: torch.dtype, group: int) -> None:
    from fuseline.compiler.ops.fake_quantize import learned_codes

    x = torch.randn(5, 32).to(dtype)
    alpha = start(x, format, group) * 0.7
    numbers, scale = learned_codes(x, alpha, format, group)
    codes = FORMATS[format].element.codes(numbers).flatten(-2)
    packed = Scheme(format, group).pack(codes) if format not in ("int4", "int8") else codes
    back = decode(packed, scale, None, None, format, group, packed is not codes, dtype)
    assert torch.equal(fake_quantize(x, alpha, format, group), back)
    assert scale.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_a_range_below_zero_recovers() -> None:
    x = torch.randn(1, 16)
    alpha = torch.full((1, 1), -0.1, requires_grad=True)
    made = fake_quantize(x, alpha, "int4", 16)
    assert made.abs().max() < 1e-6
    (made - x).square().sum().backward()
    assert alpha.grad.item() < 0  # a step against it makes the range larger


@pytest.mark.parametrize(
    "text", ("int4:sym", "int4:g16", "int3:b16", "midrise2", "ternary:g8", "binary", "fp4:g16:mse", "nvfp4")
)
def test_straight_through_weights(text: str) -> None:
    x = torch.randn(32, 32, requires_grad=True)
    scheme = Scheme.parse(text, weights=True)
    made = round_through(x, text, True)
    fixed = x.detach()
    assert torch.allclose(made, scheme.rounded(fixed, scheme.narrowed(fixed)), rtol=1e-6)
    grad = torch.randn(32, 32)
    made.backward(grad)
    assert torch.equal(x.grad, grad)


def test_llm_qats_two_bits() -> None:
    """Its code: 2·mean|w| as the scale of the clipped range, levels at ±¼ and ±¾ of it."""
    w = torch.randn(4, 64)
    scale = 2 * w.abs().mean(1, keepdim=True)
    wanted = scale * ((torch.clamp(w / scale, -0.99, 0.99) * 2 - 0.5).round() + 0.5) / 2
    assert torch.allclose(round_through(w, "midrise2", True), wanted, rtol=1e-6)


def test_ops_in_a_graph_of_torchs_compiler() -> None:
    x, alpha = torch.randn(4, 16, requires_grad=True), torch.rand(4, 1, requires_grad=True)
    torch.library.opcheck(torch.ops.fuseline.fake_quantize.default, (x, alpha, "midrise2", 16))
    torch.library.opcheck(torch.ops.fuseline.round_through.default, (x, "int4:sym", True))
