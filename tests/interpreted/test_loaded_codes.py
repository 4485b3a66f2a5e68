"""Codes of GPTQ and AWQ checkpoints, from their words to kernels in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

import fuseline
from tests.codegen.regions import error
from tests.models.gated import CASES, exact, gated


@pytest.mark.parametrize("case", CASES)
def test_kernels_read_them(case: str) -> None:
    torch.compiler.reset()
    model, weights = gated(case)
    x = torch.randn(5, 128)
    optimized = fuseline.optimize(model, "raise,fuse", target="triton")
    with torch.no_grad():
        assert error(optimized(x), exact(model, weights, x)) < 1e-5
    (compilation,) = fuseline.reports(optimized)
    ops = [op for kernel in compilation.kernels for op in kernel.ops]
    read = [op for op in ops if "decode_words" in op or "dequantize" in op]
    assert len(read) >= 3, compilation.refusals
