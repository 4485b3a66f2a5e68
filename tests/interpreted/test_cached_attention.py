"""Attention over codes in Triton's interpreter, against the op's formula in float64.

In float16: the interpreter multiplies the bits of bfloat16 tiles as integers. bfloat16 is in tests/gpu.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.attention import ROWS_MAX
from fuseline.codegen.templates.cached import emit_cached
from tests.codegen.cached_cases import CASES, Cached
from tests.codegen.regions import BOUNDS, error, loaded


def run(case: Cached, dtype: torch.dtype, folder: Path) -> None:
    launcher = emit_cached(case.graph(dtype), "attend")
    assert isinstance(launcher, Launcher), launcher
    inputs = case.inputs(dtype)
    result = case.call(loaded(launcher, folder), inputs)
    assert (result.shape, result.dtype) == ((*inputs[0].shape[:3], case.head_v), dtype)
    bound = BOUNDS[dtype] * (2 if dtype.itemsize == 2 else 1)  # codes become numbers in two roundings
    assert error(result, case.exact(inputs)) < bound
    assert error(case.call(case.function(), inputs), case.exact(inputs)) < bound  # the naive twin


IN_SINGLE = {"kivi", "groups", "fp8", "tada", "int8", "empty", "softcap"}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Cached, tmp_path: Path) -> None:
    run(case, torch.float16, tmp_path)
    if case.name in IN_SINGLE:
        run(case, torch.float32, tmp_path)


def test_sizes_and_lengths_are_read_at_run_time(tmp_path: Path) -> None:
    """One launcher for all: what is emitted knows nothing of the batch, of the capacity, nor of the tokens so far."""
    case = Cached("one", mask="causal")
    launcher = emit_cached(case.graph(torch.float32), "attend")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, tmp_path)
    for batch, capacity, length in ((1, 256, 7), (2, 128, 128), (3, 64, 81)):
        other = replace(case, batch=batch, capacity=capacity, length=length)
        inputs = other.inputs(torch.float32)
        assert error(other.call(call, inputs), other.exact(inputs)) < BOUNDS[torch.float32]


def test_a_prompt_goes_to_the_naive_twin(tmp_path: Path) -> None:
    case = Cached("prompt", queries=ROWS_MAX, length=100, mask="causal")
    launcher = emit_cached(case.graph(torch.float32), "attend")
    assert isinstance(launcher, Launcher), launcher
    inputs = case.inputs(torch.float32)
    assert error(case.call(loaded(launcher, tmp_path), inputs), case.exact(inputs)) < BOUNDS[torch.float32]
