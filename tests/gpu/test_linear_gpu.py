"""The linear template's kernels on a GPU, against eager in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.templates.linear import emit_linear
from tests.codegen import linear_runs
from tests.codegen.linear_cases import CASES, Case, Format, gated, residual, rms
from tests.codegen.regions import BOUNDS, error, loaded

pytestmark = pytest.mark.gpu

LAYERS = [
    Case("qkv of 135M", 576, (576, 192, 192), (Format(4, 64),), rms(accumulate=torch.float32), 1),
    Case("gate, up of 135M", 576, (1536, 1536), (Format(4, 96, True),), rms(), 1, epilogue=gated),
    Case("down of 135M", 1536, (576,), (Format(8),), epilogue=residual, extras=lambda m: [(m, 576)]),
    Case("qkv of 8B", 4096, (4096, 1024, 1024), (Format(4, 128),), rms(accumulate=torch.float32), 1),
    Case("gate, up of 8B", 4096, (14336, 14336), (Format(4, 128),), rms(), 1, epilogue=gated),
    Case("down of 8B", 14336, (4096,), (Format(),), epilogue=residual, extras=lambda m: [(m, 4096)]),
]


def run(case: Case, dtype: torch.dtype, folder: Path, counts: tuple[int, ...]) -> None:
    linear_runs.run(case, dtype, folder, counts, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    run(case, dtype, tmp_path, (0, 1, 3, 17, 130))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_of_real_models(case: Case, tmp_path: Path) -> None:
    run(case, torch.bfloat16, tmp_path, (1, 2, 40, 200))


def test_launches_are_captured_in_a_cuda_graph(tmp_path: Path) -> None:
    case = LAYERS[1]
    call = loaded(emit_linear(case.graph(5, torch.bfloat16), "fused"), tmp_path)
    inputs = [t.cuda() for t in case.inputs(1, torch.bfloat16)]
    call(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*inputs)
    inputs[0].copy_(torch.randn(1, case.k))
    graph.replay()
    assert error(result, case.exact(inputs)[0]) < BOUNDS[torch.bfloat16]


def test_results_do_not_depend_on_the_run(tmp_path: Path) -> None:
    """No atomics: the same inputs give the same bits."""
    case = LAYERS[0]
    call = loaded(emit_linear(case.graph(5, torch.bfloat16), "fused"), tmp_path)
    for m in (1, 40):
        inputs = [t.cuda() for t in case.inputs(m, torch.bfloat16)]
        first = call(*inputs)
        assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(first, call(*inputs)))
