"""The kernels of coded weights, in Triton's interpreter, against their naive twins in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.coded.config import CodedTiling, Tile
from fuseline.codegen.templates.linear import emit_linear
from tests.codegen.coded_cases import CASES, WITH_CODES, Coded
from tests.codegen.regions import BOUNDS, error, loaded

SMALL = Tile(16, 16, stages=2)


def run(case: Coded, folder: Path, rows: dict[torch.dtype, tuple[int, ...]], tiles: CodedTiling | None = None) -> None:
    for dtype, counts in rows.items():
        launcher = emit_linear(case.graph(5, dtype), "fused", tiles)
        assert isinstance(launcher, Launcher), launcher
        call = loaded(launcher, folder)
        for m in counts:
            seed = torch.seed() % 2**31
            inputs = case.inputs(m, dtype, seed)
            results = call(*inputs)
            results = results if isinstance(results, tuple) else (results,)
            for result, exact in zip(results, case.exact(inputs), strict=True):
                assert (result.shape, result.dtype) == (exact.shape, dtype)
                assert error(result, exact) < BOUNDS[dtype], (dtype, m, seed)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_the_run(case: Coded, tmp_path: Path) -> None:
    run(case, tmp_path, {torch.float32: (3,), torch.float16: (1, 67), torch.bfloat16: (1, 67)})


@pytest.mark.parametrize("case", WITH_CODES, ids=str)
def test_codes_of_the_run(case: Coded, tmp_path: Path) -> None:
    run(case, tmp_path, {torch.float32: (1, 67)})
