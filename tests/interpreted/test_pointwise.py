"""Pointwise ops, casts and broadcasting, against eager in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fuseline.compiler.ops import glu
from tests.codegen.regions import check, emitted

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

UNARY = {
    "neg": lambda x: -x,
    "abs": torch.abs,
    "square": torch.square,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sqrt_of_abs": lambda x: torch.sqrt(x.abs()),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.1),
    "log": lambda x: torch.log(x.abs() + 0.1),
    "log2": lambda x: torch.log2(x.abs() + 0.1),
    "log1p": lambda x: torch.log1p(x.abs()),
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.5),
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "softplus": lambda x: F.softplus(x, 2.0, 5.0),
    "sign": torch.sign,
    "cube": lambda x: x**3,
    "fifth": lambda x: (x / 3) ** 5,
    "inverse_square": lambda x: (x.abs() + 0.5) ** -2,
    "to_the_0.75": lambda x: (x.abs() + 0.1) ** 0.75,
    "power_of_scalar": lambda x: 1.7**x,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "clamp_min": lambda x: x.clamp(min=0.1),
    "scaled": lambda x: 1.5 - 0.25 * x + x / 3.0,
}
STEPS = {"floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, tmp_path: Path) -> None:
    for dtype in FLOATS:
        x = (3 * torch.randn(5, 37)).to(dtype)
        check(lambda x: UNARY[name](x), x, folder=tmp_path, bound=1e-5 if dtype == torch.float32 else None)


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_exact(name: str, tmp_path: Path) -> None:
    halves = torch.arange(-9, 10, dtype=torch.float32) / 2
    x = torch.cat((halves, 10 * torch.randn(40), torch.tensor([1e-9, -1e-9, 2.0**23 + 1, -(2.0**24), 0.49999997])))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        check(lambda x: STEPS[name](x), x.to(dtype), folder=tmp_path, bound=1e-30)


def test_tanh_is_accurate_where_it_is_small(tmp_path: Path) -> None:
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        x = torch.logspace(-6, 1, 200, dtype=dtype)
        check(lambda x: torch.tanh(x) / x, x, folder=tmp_path, bound=limit)


def test_what_is_not_a_number_stays_so(tmp_path: Path) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -2.0])
    y = torch.tensor([1.0, 2.0, float("nan"), float("nan"), 1.0])

    def function(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            torch.relu(x), x.clamp(-1, 1), torch.maximum(x, y), torch.minimum(y, x), torch.clamp(x, y, y + 1),
            torch.isnan(x), torch.isinf(x), torch.tanh(x), torch.sigmoid(x), torch.sign(torch.relu(y)), x**0,
            torch.exp(x),
        )  # fmt: skip

    # sign(nan) is 0 in PyTorch, too
    check(function, x, y, folder=tmp_path)


def test_comparisons_and_logic(tmp_path: Path) -> None:
    def function(x: torch.Tensor, y: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = x > y, k <= 2
        return (
            a & b, a | b, a ^ b, ~a, torch.logical_not(k), torch.logical_xor(a, k), x == y, x != 0.5, k < y, k >= x,
            torch.where(a, x, y), torch.where(b, x, -1.0), x.masked_fill(a, float("-inf")), a + b, a * b,
            torch.where(a, k, 7),
        )  # fmt: skip

    x, k = torch.randn(4, 9), torch.randint(-3, 4, (4, 9))
    check(function, x, torch.randn(4, 9).round(), k, folder=tmp_path)


@pytest.mark.parametrize("dtype", (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
def test_integers(dtype: torch.dtype, tmp_path: Path) -> None:
    def function(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = [
            a + b, a - b, a * b, 3 * a, a + 5, a & b, a | 3, a ^ b, ~a, a << 1, a >> 2, a // b, a // 3, a % b, a % 5,
            torch.maximum(a, b), a.clamp(1, 9), a == b, a**2, torch.div(a, b, rounding_mode="trunc"),
            a / b, a.float() * 0.5, a.to(torch.int32), a.to(torch.bool), a.to(torch.float64) / 3, torch.sqrt(abs(b)),
        ]  # fmt: skip
        return tuple(results)

    low = 0 if dtype == torch.uint8 else -90
    a = torch.randint(low, 90, (6, 11)).to(dtype)
    b = torch.randint(1, 20, (6, 11)).to(dtype)
    if dtype != torch.uint8:
        b = b * torch.where(torch.rand(6, 11) < 0.5, -1, 1).to(dtype)
    check(function, a, b, folder=tmp_path)


def test_large_int64_and_constants_are_exact(tmp_path: Path) -> None:
    a = torch.randint(-(2**62), 2**62, (50,))
    check(lambda a: (a + 2**61 - 2**60, a & (2**40 - 1), torch.where(a > 0, a, 2**53 + 1)), a, folder=tmp_path)
    x = torch.randn(50, dtype=torch.float64)
    check(lambda x: (x * 0.1 + 1 / 3, torch.where(x > 0, x, 0.7)), x, folder=tmp_path)


def test_casts_round_where_the_graph_says(tmp_path: Path) -> None:
    """Exactly, in float16. (Triton's interpreter truncates to bfloat16, where hardware rounds: one unit more.)"""
    x = 100 * torch.randn(300)
    check(lambda x: x.to(torch.float16).to(torch.float32) - x, x, folder=tmp_path, bound=1e-6)
    check(lambda x: x.to(torch.bfloat16).to(torch.float32), x, folder=tmp_path, bound=2.0**-7)
    launcher = emitted(lambda x: x.to(torch.bfloat16).to(torch.float32) - x, x)
    assert ".to(tl.bfloat16).to(tl.float32)" in launcher.kernels[0].source
    check(lambda x: (x.to(torch.int32), x.to(torch.int8), x.to(torch.bool), x.bfloat16()), x, folder=tmp_path)


def test_a_fused_chain_is_not_rounded_between_its_ops(tmp_path: Path) -> None:
    """1 + 2^-10 is 1 in bfloat16: eager loses it, the kernel keeps it until it stores."""
    x = torch.full((16,), 2.0**-10, dtype=torch.bfloat16)
    assert torch.equal((x + 1) - 1, torch.zeros_like(x))
    check(lambda x: (x + 1) - 1, x, folder=tmp_path)


def test_mixed_dtypes_promote_as_in_eager(tmp_path: Path) -> None:
    def function(h: torch.Tensor, f: torch.Tensor, k: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return h + f, h * k, k * 1.5, h * s, k + (f > 0), h.type_as(f) + 1, f.to(h.dtype) * h

    h, f = torch.randn(7, 5, dtype=torch.bfloat16), torch.randn(7, 5)
    check(function, h, f, torch.randint(0, 9, (7, 5)), torch.tensor(2.5), folder=tmp_path)


def test_broadcasting(tmp_path: Path) -> None:
    def function(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return x * w + r - s[:, None, None] + w.unsqueeze(0).expand(4, 3, 10)

    inputs = torch.randn(4, 3, 10), torch.randn(10), torch.randn(3, 1), torch.randn(4)
    check(function, *inputs, folder=tmp_path)


@pytest.mark.parametrize("activation", ("silu", "gelu", "gelu_tanh", "relu", "sigmoid"))
def test_glu(activation: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        gate, up = torch.randn(3, 70, dtype=dtype), torch.randn(3, 70, dtype=dtype)
        check(lambda g, u: glu(g, u, activation), gate, up, folder=tmp_path)


def test_glu_on_halves_of_one_tensor(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    check(function, torch.randn(3, 2, 130), folder=tmp_path)


def test_derivatives_of_activations(tmp_path: Path) -> None:
    aten = torch.ops.aten

    def function(g: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            aten.silu_backward(g, x), aten.sigmoid_backward(g, x.sigmoid()), aten.tanh_backward(g, x.tanh()),
            aten.threshold_backward(g, x, 0.3), torch.addcmul(g, x, x, value=0.5),
        )  # fmt: skip

    check(function, torch.randn(4, 33), torch.randn(4, 33), folder=tmp_path)


def test_strides_are_read_at_run_time(tmp_path: Path) -> None:
    """Traced on contiguous tensors, run on transposed, sliced and expanded ones."""
    x, y = torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    others = [
        (torch.randn(8, 5, 6).transpose(0, 2), torch.randn(6, 5, 1).expand(6, 5, 8)),
        (torch.randn(6, 10, 24)[:, ::2, 8:16], torch.randn(5, 8).expand(6, 5, 8)),
        (torch.randn(6, 5, 8).permute(0, 1, 2)[..., :], torch.randn(()).expand(6, 5, 8)),
    ]
    check(lambda x, y: x * 2 + y, x, y, folder=tmp_path, run=others)


def test_sizes_at_tile_edges(tmp_path: Path) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * w + 1

    for n in (1, 2, 127, 128, 129, 576, 1000, 1024, 1025, 2048):
        check(function, torch.randn(3, n), torch.randn(n), folder=tmp_path)
    for rows in (1, 2, 7, 8, 9, 65):
        check(function, torch.randn(rows, 3, 60), torch.randn(60), folder=tmp_path)


def test_no_dimensions_and_no_elements(tmp_path: Path) -> None:
    check(lambda x, y: x * y + 1, torch.randn(()), torch.randn(()), folder=tmp_path)
    check(lambda x, y: x * y, torch.randn(1, 1, 1), torch.randn(()), folder=tmp_path)
    for shape in ((0,), (3, 0), (0, 5), (2, 0, 5)):
        check(lambda x: x * 2, torch.randn(shape), folder=tmp_path)


def test_symbolic_sizes_are_read_at_run_time(tmp_path: Path) -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x * w + x.shape[0]

    sizes = [(1, 1, 12), (9, 1, 12), (2, 130, 12), (0, 4, 12), (3, 0, 12)]
    run = [(torch.randn(s), torch.randn(12)) for s in sizes]
    check(function, torch.randn(4, 6, 12), torch.randn(12), dynamic={0: (0, 1)}, run=run, folder=tmp_path)
    run = [(torch.randn(a, b), torch.randn(b)) for a, b in ((1, 1), (5, 3000), (600, 2), (0, 3), (3, 0))]
    check(function, torch.randn(4, 6), torch.randn(6), dynamic={0: (0, 1), 1: (0,)}, run=run, folder=tmp_path)
    check(lambda x: x + 1, torch.randn(77), dynamic={0: (0,)}, run=[(torch.randn(5000),)], folder=tmp_path)


def test_a_size_as_an_operand(tmp_path: Path) -> None:
    def function(x: torch.Tensor, length: int) -> tuple[torch.Tensor, int]:
        return x / length + torch.arange(x.shape[1]) * 0.5, length * 2

    run = [(torch.randn(4, 9), 5), (torch.randn(2, 30), 1)]
    check(function, torch.randn(3, 8), 17, dynamic={0: (0, 1)}, run=run, folder=tmp_path)


def test_results_that_are_inputs_or_repeated(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = x + 1
        return x, y, y, y.float() * 2

    check(function, torch.randn(5, 6, dtype=torch.bfloat16), folder=tmp_path)


def test_created_tensors(tmp_path: Path) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mask = torch.arange(x.shape[1])[None, :] <= torch.arange(x.shape[0])[:, None]
        bias = torch.where(mask, torch.zeros_like(x), torch.full_like(x, float("-inf")))
        return x + bias, x * torch.full((), 0.3), torch.arange(1, 10, 2)[: x.shape[0], None] * torch.ones_like(x)

    check(function, torch.randn(5, 7), folder=tmp_path)
