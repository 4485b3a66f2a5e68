"""The kernels of routed experts, in Triton's interpreter, against the op's naive twin in float64."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.experts.config import RowConfig, Stage, TileConfig, Tiling
from fuseline.codegen.templates.moe import emit_moe
from tests.codegen.moe_cases import CASES, PAIRS, Case
from tests.codegen.regions import BOUNDS, error, loaded

BY_NAME = {case.name: case for case in CASES + PAIRS}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = Tiling(
    Stage(RowConfig(2, 16), RowConfig(4, 8)),
    Stage(TileConfig(64, 16, 32), TileConfig(64, 32, 16, group_m=2)),
    Stage(TileConfig(128, 32, 16), TileConfig(128, 16, 32)),
)


def run(
    case: Case,
    dtype: torch.dtype,
    folder: Path,
    counts: Iterable[int],
    tiles: Tiling | None = None,
    indices: torch.Tensor | None = None,
) -> None:
    launcher = emit_moe(case.graph(dtype), "fused", tiles)
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, folder)
    for m in counts:
        seed = torch.seed() % 2**31
        inputs = case.inputs(m, dtype, seed, indices=indices)
        result, again, exact = call(*inputs), call(*inputs), case.exact(inputs)
        assert (result.shape, result.dtype) == (exact.shape, dtype)
        assert error(result, exact) < BOUNDS[dtype], (m, seed)
        assert torch.equal(result, again)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    """One token, some, none; and so many for each expert that the tiles are those of arithmetic."""
    run(case, dtype, tmp_path, (1, 5, 0))


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs(case: Case, tmp_path: Path) -> None:
    run(case, torch.bfloat16, tmp_path, (1, 5, 0))
