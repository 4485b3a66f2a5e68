"""The sparse linear template's kernels, in Triton's interpreter, against the op's formula in float64."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.sparse import emit_sparse
from fuseline.codegen.templates.sparse_gather import GatherConfig
from tests.codegen.regions import BOUNDS, error, loaded
from tests.codegen.sparse_cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}


def run(
    case: Case,
    folder: Path,
    rows: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    config: GatherConfig | None = None,
    level: float = 0.7,
) -> None:
    launcher = emit_sparse(case.graph(dtype), "fused", config)
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, folder)
    for m in rows:
        seed = torch.seed() % 2**31
        inputs = case.inputs(m, dtype, seed, level)
        results = call(*inputs)
        again = call(*inputs)
        results, again = (r if isinstance(r, tuple) else (r,) for r in (results, again))
        for result, repeated, exact in zip(results, again, case.exact(inputs), strict=True):
            assert (result.shape, result.dtype) == (exact.shape, dtype)
            assert error(result, exact) < BOUNDS[dtype], (m, seed)
            assert torch.equal(result, repeated)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_row(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    run(case, tmp_path, (1,), dtype)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", ["gate, up", "int4 g48 zero", "dense above 2", "several chunks"])
def test_few_and_many_rows(name: str, tmp_path: Path) -> None:
    """Each row has a mask of its own; with more rows than kernels take, PyTorch multiplies."""
    run(BY_NAME[name], tmp_path, (2, 4, 5, 19))


@pytest.mark.one_in(6)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("chunk, block_k, block_n", [(32, 8, 16), (128, 32, 32), (512, 16, 256)])
@pytest.mark.parametrize("name", ["odd sizes", "qkv", "int8 g16 zero", "int4 g48 zero"])
def test_any_tile(name: str, chunk: int, block_k: int, block_n: int, compact: bool, tmp_path: Path) -> None:
    run(BY_NAME[name], tmp_path, (1, 3), config=GatherConfig(chunk, block_k, block_n, compact, finish_n=32))


@pytest.mark.parametrize("level", [-1.0, 100.0], ids=["all kept", "all dropped"])
@pytest.mark.parametrize("name", ["gate, up", "odd sizes", "int4 g32"])
def test_all_or_nothing(name: str, level: float, tmp_path: Path) -> None:
    run(BY_NAME[name], tmp_path, (1,), level=level)


def test_a_nan_is_kept(tmp_path: Path) -> None:
    case = BY_NAME["float"]
    launcher = emit_sparse(case.graph(torch.float32), "fused")
    assert isinstance(launcher, Launcher)
    inputs = case.inputs(2, torch.float32, 0)
    inputs[0][1, 5] = float("nan")
    result = loaded(launcher, tmp_path)(*inputs)
    assert result[1].isnan().all() and not result[0].isnan().any()


def test_poison_is_seen(tmp_path: Path) -> None:
    """The check of these tests fails for a first kernel that leaves columns unwritten."""
    case = BY_NAME["several chunks"]
    launcher = emit_sparse(case.graph(torch.float32), "fused")
    assert isinstance(launcher, Launcher)
    one_less = re.sub(r"\(m \* (\d+), ", lambda grid: f"(m * {int(grid[1]) - 1}, ", launcher.source)
    shortened = Launcher(launcher.name, one_less, launcher.kernels)
    assert shortened.source != launcher.source
    inputs = case.inputs(1, torch.float32, 0)
    assert not error(loaded(shortened, tmp_path)(*inputs), case.exact(inputs)[0]) < 1
