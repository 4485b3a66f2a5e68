"""The kernels of coded weights on a GPU, in bfloat16 too, against their naive twins in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.templates.linear import emit_linear
from tests.codegen import linear_runs
from tests.codegen.coded_cases import CASES, WITH_CODES, Coded
from tests.codegen.regions import loaded

pytestmark = pytest.mark.gpu


def run(case: Coded, dtype: torch.dtype, folder: Path, counts: tuple[int, ...]) -> None:
    linear_runs.run(case, dtype, folder, counts, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_of_the_run(case: Coded, dtype: torch.dtype, tmp_path: Path) -> None:
    run(case, dtype, tmp_path, (0, 1, 17, 40, 130))


@pytest.mark.parametrize("case", WITH_CODES, ids=str)
def test_codes_of_the_run(case: Coded, tmp_path: Path) -> None:
    run(case, torch.bfloat16, tmp_path, (0, 1, 17, 40, 130))


@pytest.mark.parametrize("scheme", ["int4:g128", "int8", "int2:g128", "ternary", "fp8"])
def test_layers_of_a_real_model(scheme: str, tmp_path: Path) -> None:
    run(Coded(scheme, 4096, (6144,), "rms"), torch.bfloat16, tmp_path, (1, 3, 64, 200))


def test_launches_are_captured_and_do_not_depend_on_the_run(tmp_path: Path) -> None:
    """Partial sums are added in order: the same inputs give the same bits, in a CUDA graph too."""
    case = Coded("int4:g128", 4096, (4096,))
    call = loaded(emit_linear(case.graph(5, torch.bfloat16), "fused"), tmp_path)
    inputs = [t.cuda() for t in case.inputs(1, torch.bfloat16)]
    first = call(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*inputs)
    for _ in range(5):
        graph.replay()
        assert torch.equal(result, first)
