"""What a step adds to a cache, in Triton's interpreter: the rotation, the rows that are written, those that are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.append import emit_append
from tests.codegen.append_cases import CASES, inputs, made, read, step
from tests.codegen.regions import BOUNDS, loaded


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rows_are_those_of_the_naive_step(case: tuple[Any, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    given, function = inputs(case, dtype), step(*case[-3:])
    launcher = emit_append(made(function, tuple(given.values())), "step")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, tmp_path)
    ours = {name: x.clone(memory_format=torch.preserve_format) for name, x in read(case, given).items()}
    results = call(*ours.values())
    expected = function(*(x.double() if x.is_floating_point() else x.clone() for x in given.values()))
    assert len(results) == len(expected)
    for mine, true in zip(results, expected, strict=True):
        assert (mine.double() - true).abs().max() <= BOUNDS[dtype] * true.abs().max()
    assert results[-1] is ours["values"] and results[-2] is ours["keys"]  # written in place


def test_what_does_not_fit_is_not_written_and_shows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8)
    cos, sin, at = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 2, 8), torch.tensor([5])
    room = torch.randn(1, 2, 8, 8)  # the cache is the first six rows of it
    keys, values = room.clone()[:, :, :6], room.clone()[:, :, :6]
    launcher = emit_append(made(step(True, True, True), (q, k, v, cos, sin, keys, values, torch.tensor([0]))), "step")
    assert isinstance(launcher, Launcher)
    out, _, _ = loaded(launcher, tmp_path)(q, k, v, cos, sin, keys, values, at)
    assert not torch.equal(keys[:, :, 5], room[:, :, 5])
    assert torch.equal(keys._base[:, :, 6:], room[:, :, 6:]) and torch.equal(values._base[:, :, 6:], room[:, :, 6:])
    assert out[:, :, 0].isfinite().all() and out[:, :, 1].isnan().all()
