"""The kernels of routed experts on a GPU, against the op's naive twin in float64; the same bits in every run, and in a
CUDA graph that was captured with another routing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.moe import emit_moe
from tests.codegen.moe_cases import CASES, CODED, PAIRS, Case, Layer
from tests.codegen.regions import BOUNDS, error, loaded

pytestmark = pytest.mark.gpu

LAYERS = [
    Case("8 large experts", 4096, 3584, 8, 2),
    Case("64 experts", 2048, 1024, 64, 8),
    Case("128 experts", 2048, 768, 128, 8),
    Case("32 experts with bias", 2880, 1440, 32, 4, None, "clamped_swiglu", True, True, True),
    Case("pairs of 8", 4096, 3584, 8, 2, pairs=4),
    Case("pairs of 128", 2048, 768, 128, 8, pairs=64),
    Case("some pairs of 64", 2048, 1024, 64, 8, pairs=16),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def made(case: Case, dtype: torch.dtype, folder: Path):
    launcher = emit_moe(case.graph(dtype), "fused")
    assert isinstance(launcher, Launcher), launcher
    return loaded(launcher, folder)


def check(call, case: Case, inputs: list[torch.Tensor]) -> torch.Tensor:
    dtype = inputs[0].dtype
    result = call(*inputs)
    exact = case.call(*case.wide(inputs))
    assert (result.shape, result.dtype) == (exact.shape, dtype)
    assert error(result, exact) < BOUNDS[dtype], (dtype, len(inputs[0]))
    assert all(torch.equal(result, call(*inputs)) for _ in range(2))
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    call = made(case, dtype, tmp_path)
    for m in (1, 2, 17, 130, 700):
        check(call, case, case.inputs(m, dtype, m, "cuda"))


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs(case: Case, tmp_path: Path) -> None:
    call = made(case, torch.bfloat16, tmp_path)
    for m in (1, 2, 17, 130, 700):
        check(call, case, case.inputs(m, torch.bfloat16, m, "cuda"))


@pytest.mark.parametrize("case", CODED, ids=str)
def test_codes(case: Case, tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        call = made(case, dtype, tmp_path / str(dtype))
        for m in (1, 2, 17, 130, 700):
            check(call, case, case.inputs(m, dtype, m, "cuda"))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_of_real_models(case: Case, tmp_path: Path) -> None:
    """bfloat16; the reference is float32, since so many experts in float64 fit no small GPU."""
    call = made(case, torch.bfloat16, tmp_path)
    for m in (1, 4, 64, 1024, 4096):
        inputs = case.inputs(m, torch.bfloat16, m, "cuda")
        result = call(*inputs)
        count = min(m, 64)
        some = [t[:count].float() if i in (0, 2) else t[:count] if i == 1 else t for i, t in enumerate(inputs)]
        some = [t.float() if t.dtype == torch.bfloat16 else t for t in some]
        assert error(result[:count], case.call(*some)) < BOUNDS[torch.bfloat16], m
        assert torch.equal(result, call(*inputs))


@pytest.mark.parametrize("case", [CASES[0], CASES[2], PAIRS[0], PAIRS[1]], ids=str)
@pytest.mark.parametrize("m", [1, 5, 300])
def test_one_graph_serves_any_routing(case: Case, m: int, tmp_path: Path) -> None:
    call = made(case, torch.bfloat16, tmp_path)
    inputs = case.inputs(m, torch.bfloat16, 0, "cuda")
    call(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*inputs)
    everything = torch.zeros_like(inputs[1])
    for routing in (*(case.inputs(m, torch.bfloat16, seed, "cuda")[1] for seed in (1, 2)), everything):
        inputs[1].copy_(routing)
        graph.replay()
        exact = case.call(*case.wide(inputs))
        assert error(result, exact) < BOUNDS[torch.bfloat16]
        assert torch.equal(result, call(*inputs))


@pytest.mark.parametrize("m", [9, 4096, 10000])
def test_all_tokens_on_one_expert(m: int, tmp_path: Path) -> None:
    case = CASES[2]
    indices = torch.full((m, case.top), 3)
    check(made(case, torch.bfloat16, tmp_path), case, case.inputs(m, torch.bfloat16, 0, "cuda", indices))


def test_a_compiled_model_runs_the_kernels(tmp_path: Path) -> None:
    """torch.compile(backend="fuseline") of a layer with experts: fewer launches than experts, the same result."""
    layer = Layer(Case("layer", 256, 128, 16, 4)).cuda().eval()
    x = torch.randn(33, 256, device="cuda")
    with torch.no_grad():
        compiled = torch.compile(layer, backend="fuseline")
        assert error(compiled(x), layer.double()(x.double())) < 1e-4
