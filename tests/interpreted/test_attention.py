"""Flash decoding in Triton's interpreter, against the op's formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.attention import ROWS_MAX, emit_attention
from tests.codegen.attention_cases import CASES, Attend
from tests.codegen.regions import BOUNDS, error, loaded


def run(case: Attend, dtype: torch.dtype, folder: Path, device: str = "cpu") -> None:
    launcher = emit_attention(case.graph(dtype), "attend")
    assert isinstance(launcher, Launcher), launcher
    inputs = case.inputs(dtype, device)
    result = loaded(launcher, folder)(*inputs)
    assert (result.shape, result.dtype) == ((*inputs[0].shape[:3], case.head_v), dtype)
    assert error(result, case.exact(inputs)) < BOUNDS[dtype]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Attend, dtype: torch.dtype, tmp_path: Path) -> None:
    run(case, dtype, tmp_path)


def test_sizes_are_read_at_run_time(tmp_path: Path) -> None:
    case = Attend("symbolic", batch=2, mask="prefix", keys=20, queries=3)
    dynamic = {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2, 3)}
    launcher = emit_attention(case.graph(torch.float32, dynamic), "attend")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, tmp_path)
    for batch, queries, keys in ((1, 1, 1), (3, 2, 90), (2, 5, 33)):
        case = Attend("symbolic", batch=batch, mask="prefix", keys=keys, queries=queries)
        inputs = case.inputs(torch.float32)
        assert error(call(*inputs), case.exact(inputs)) < BOUNDS[torch.float32]


def test_many_queries_go_to_pytorch(tmp_path: Path) -> None:
    case = Attend("prefill", queries=ROWS_MAX, keys=ROWS_MAX, kind="causal")
    launcher = emit_attention(case.graph(torch.float32), "attend")
    assert isinstance(launcher, Launcher)
    inputs = case.inputs(torch.float32)
    call = loaded(launcher, tmp_path)
    assert error(call(*inputs), case.exact(inputs)) < BOUNDS[torch.float32]
    assert call(*(t[:0] for t in inputs)).shape == (0, case.heads, ROWS_MAX, case.head_v)


def test_the_result_is_laid_out_for_the_projection_after_it(tmp_path: Path) -> None:
    case = Attend("layout", batch=2, queries=3)
    launcher = emit_attention(case.graph(torch.float32), "attend")
    assert isinstance(launcher, Launcher)
    assert loaded(launcher, tmp_path)(*case.inputs(torch.float32)).transpose(1, 2).is_contiguous()
