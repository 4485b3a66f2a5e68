"""Attention over codes in Triton's interpreter, against the op's formula in float64.

In float16: the interpreter multiplies the bits of bfloat16 tiles as integers. bfloat16 is in tests/gpu.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.cached import emit_cached
from tests.codegen.cached_cases import CASES, Cached
from tests.codegen.regions import BOUNDS, error, loaded


def run(case: Cached, dtype: torch.dtype, folder: Path, device: str = "cpu") -> None:
    launcher = emit_cached(case.graph(dtype), "attend")
    assert isinstance(launcher, Launcher), launcher
    inputs = case.inputs(dtype, device)
    result = case.call(loaded(launcher, folder), inputs)
    assert (result.shape, result.dtype) == ((*inputs[0].shape[:3], case.head_v), dtype)
    assert error(result, case.exact(inputs)) < BOUNDS[dtype]
    assert error(case.call(case.function(), inputs), case.exact(inputs)) < BOUNDS[dtype]  # the naive twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Cached, dtype: torch.dtype, tmp_path: Path) -> None:
    run(case, dtype, tmp_path)
