"""The kernels of one case of linears, run and compared with float64."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.linear import emit_linear
from tests.codegen.regions import BOUNDS, error, loaded


def run(
    case: Any, dtype: torch.dtype, folder: Path, counts: Iterable[int], tiles: Any = None, device: str = "cpu"
) -> None:
    """case: of `linear_cases` or `coded_cases`, emitted once for `dtype`; counts: rows of the calls."""
    launcher = emit_linear(case.graph(5, dtype), "fused", tiles)
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, folder)
    for m in counts:
        seed = torch.seed() % 2**31
        inputs = [t.to(device) for t in case.inputs(m, dtype, seed)]
        results = call(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        for result, exact in zip(results, case.exact(inputs), strict=True):
            assert (result.shape, result.dtype) == (exact.shape, dtype)
            assert error(result, exact) < BOUNDS[dtype], (dtype, m, seed)
