"""Codes of GPTQ and AWQ checkpoints, float16 scales and all, read by kernels on a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

import fuseline
from tests.codegen.regions import BOUNDS, error
from tests.models.gated import CASES, Gated, exact, gated, reading

pytestmark = pytest.mark.gpu


def moved(model: Gated, dtype: torch.dtype) -> Gated:
    """On the GPU in a dtype, scales as they are."""
    model.cuda()
    model.norm.to(dtype)
    for linear in (model.gate, model.up, model.down):
        assert linear.bias is not None
        linear.bias.data = linear.bias.data.to(dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda x: str(x).removeprefix("torch."))
@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("case", CASES)
def test_kernels_read_them(case: str, rows: int, dtype: torch.dtype) -> None:
    torch.compiler.reset()
    model, weights = gated(case)
    optimized = fuseline.optimize(moved(model, dtype), "raise,fuse", target="triton")
    x = torch.randn(rows, 128, device="cuda", dtype=dtype)
    with torch.no_grad():
        result = optimized(x)
    assert result.dtype == dtype
    assert error(result.cpu(), exact(model, weights, x)) < 2 * BOUNDS[dtype]
    (compilation,) = fuseline.reports(optimized)
    assert len(reading(compilation)) >= 3, compilation.refusals
