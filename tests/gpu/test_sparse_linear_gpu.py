"""The sparse linear template's kernels on a GPU, against the op's formula in float64; the same bits in every run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.sparse import emit_sparse
from tests.codegen.linear_cases import Format
from tests.codegen.regions import BOUNDS, error, loaded
from tests.codegen.sparse_cases import CASES, Case, gated

pytestmark = pytest.mark.gpu

LAYERS = [
    Case("qkv of 135M", 576, (576, 192, 192), rank=16),
    Case("down of 135M", 1536, (576,), Format(4, 64), epilogue=lambda y, h: h + y, extra=True),
    Case("qkv of 8B", 4096, (4096, 1024, 1024), Format(8)),
    Case("gate, up of 8B", 4096, (14336, 14336), rank=64, epilogue=gated),
    Case("down of 8B", 14336, (4096,), Format(4, 128), rank=64),
]


def run(case: Case, dtype: torch.dtype, folder: Path, counts: tuple[int, ...]) -> None:
    launcher = emit_sparse(case.graph(dtype), "fused")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, folder)
    for m in counts:
        seed = torch.seed() % 2**31
        inputs = case.inputs(m, dtype, seed, device="cuda")
        first, *again = (r if isinstance(r, tuple) else (r,) for r in (call(*inputs) for _ in range(3)))
        for number, (result, exact) in enumerate(zip(first, case.exact(inputs), strict=True)):
            assert (result.shape, result.dtype) == (exact.shape, dtype)
            assert error(result, exact) < BOUNDS[dtype], (dtype, m, seed)
            assert all(torch.equal(result, other[number]) for other in again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    run(case, dtype, tmp_path, (1, 3, 17))


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_of_real_models(case: Case, tmp_path: Path) -> None:
    run(case, torch.bfloat16, tmp_path, (1, 2, 4, 40))
