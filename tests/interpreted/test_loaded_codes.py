"""Codes of GPTQ and AWQ checkpoints, from their words to kernels in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch

import fuseline
from tests.codegen.regions import error
from tests.models.gated import CASES, exact, gated, reading


@pytest.mark.parametrize("case", CASES)
def test_kernels_read_them(case: str) -> None:
    torch.compiler.reset()
    model, weights = gated(case)
    x = torch.randn(5, 128)
    optimized = fuseline.optimize(model, "raise,fuse", target="triton")
    with torch.no_grad():
        assert error(optimized(x), exact(model, weights, x)) < 1e-5
    (compilation,) = fuseline.reports(optimized)
    assert len(reading(compilation)) >= 3, compilation.refusals
