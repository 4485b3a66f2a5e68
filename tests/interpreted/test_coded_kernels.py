"""The kernels of coded weights, in Triton's interpreter, against their naive twins in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.templates.coded.config import CodedTiling, Tile
from tests.codegen import linear_runs
from tests.codegen.coded_cases import CASES, WITH_CODES, Coded

SMALL = Tile(16, 16, stages=2)


def run(case: Coded, folder: Path, rows: dict[torch.dtype, tuple[int, ...]], tiles: CodedTiling | None = None) -> None:
    for dtype, counts in rows.items():
        linear_runs.run(case, dtype, folder, counts, tiles)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_the_run(case: Coded, tmp_path: Path) -> None:
    run(case, tmp_path, {torch.float32: (3,), torch.float16: (1, 67), torch.bfloat16: (1, 67)})


@pytest.mark.parametrize("case", WITH_CODES, ids=str)
def test_codes_of_the_run(case: Coded, tmp_path: Path) -> None:
    run(case, tmp_path, {torch.float32: (1, 67)})
