"""What a step adds to a cache, on a GPU: against float64, and rows that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.append import emit_append
from tests.codegen.append_cases import CASES, inputs, made, read, step
from tests.codegen.regions import BOUNDS, loaded

pytestmark = pytest.mark.gpu
LARGE = [(1, 1, 32, 8, 128, 128, True, True, True), (16, 1, 32, 8, 128, 128, True, True, True)]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_are_those_of_the_naive_step(case: tuple[Any, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    given, function = inputs(case, dtype), step(*case[-3:])
    launcher = emit_append(made(function, tuple(given.values())), "step")
    assert isinstance(launcher, Launcher), launcher
    results = loaded(launcher, tmp_path)(*(x.cuda() for x in read(case, given).values()))
    expected = function(*(x.double() if x.is_floating_point() else x for x in given.values()))
    for mine, true in zip(results, expected, strict=True):
        assert (mine.cpu().double() - true).abs().max() <= BOUNDS[dtype] * true.abs().max()
