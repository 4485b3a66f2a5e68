"""Kernels of fake quantization against the ops' naive twins, on poisoned results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from fuseline.compiler.formats import FORMATS
from fuseline.compiler.formats.learned import initial_range
from fuseline.compiler.ops import fake_quantize, fake_quantize_backward, round_through
from fuseline.runtime import fake_quantize as launches

FORMS = ("int8", "int4", "int3", "int2", "midrise4", "midrise3", "midrise2", "ternary", "binary")
SHAPES = ((3, 64, 64), (2, 96, 32), (1, 4200, 4200), (4, 7, 7))  # rows, channels, group


@pytest.fixture(autouse=True)
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 → bfloat16 to nearest, as hardware does; Triton's interpreter cuts."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def nearest(self, x, kind):
        if x.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
            return interpreter.TensorHandle(bits, tl.bfloat16)
        return cast(self, x, kind)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", nearest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fp_trunc", nearest)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **how: torch.full_like(x, float("nan"), **how))


def case(format: str, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, channels, group = shape
    x = torch.randn(rows, channels).to(dtype)
    alpha = initial_range(x.unflatten(-1, (-1, group)), FORMATS[format].element).squeeze(-1)
    alpha *= torch.rand_like(alpha) + 0.4  # some clip, some do not fill the grid
    alpha[0, 0] = -1.0  # below the least range
    x[-1, :3] = torch.tensor([0.0, 1e-30, -60000.0]).to(dtype)
    return x, alpha


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMS)
def test_learned_ranges(format: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    if shape[1] > 1000 and (dtype is not torch.float32 or format not in ("int4", "midrise2")):
        pytest.skip("one long row is enough for what depends on length")
    x, alpha = case(format, shape, dtype)
    grad = torch.randn_like(x)
    made = launches.forward(x, alpha, format, shape[2])
    assert torch.equal(made, fake_quantize.naive(x, alpha, format, shape[2]))
    found = launches.backward(grad, x, alpha, format, shape[2])
    wanted = fake_quantize_backward.naive(grad, x, alpha, format, shape[2])
    assert torch.equal(found[0], wanted[0])
    assert (found[1] - wanted[1]).abs().max() <= 1e-4 * wanted[1].abs().max()  # sums in another order


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize(
    "scheme,weights", (("int8", False), ("int4:g32", False), ("int4:sym:g32", True), ("int2:sym", True))
)
def test_ranges_of_the_values_themselves(scheme: str, weights: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 96).to(dtype)
    x[0, 0], x[1, 2, :5] = 0.0, 1e-20
    assert torch.equal(launches.through(x, scheme, weights), round_through.naive(x, scheme, weights))


def test_what_no_number_stands_for_is_seen() -> None:
    x = torch.randn(2, 32)
    x[0, 3] = float("inf")
    made = launches.through(x, "int4:sym", True)
    assert made[0].isnan().all() and made[1].isfinite().all()


def test_what_has_no_kernel_runs_as_the_naive_twin() -> None:
    x = torch.randn(2, 32, dtype=torch.float64)
    alpha = torch.ones(2, 1)
    assert torch.equal(launches.forward(x, alpha, "int4", 32), fake_quantize.naive(x, alpha, "int4", 32))
    assert torch.equal(launches.through(x.float(), "fp4:g16", True), round_through.naive(x.float(), "fp4:g16", True))
