"""Flash decoding on a GPU, against the op's formula in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.attention import emit_attention
from tests.codegen.attention_cases import CASES, Attend
from tests.codegen.regions import BOUNDS, error, loaded

pytestmark = pytest.mark.gpu

LAYERS = [
    Attend("step of 8B", heads=32, kv_heads=8, keys=1024, head=128, head_v=128, mask="prefix"),
    Attend("step of 135M", heads=9, kv_heads=3, keys=256, head=64, head_v=64, mask="prefix"),
    Attend("long", heads=32, kv_heads=8, keys=40000, head=128, head_v=128),
    Attend("batch of 16", batch=16, heads=32, kv_heads=8, keys=700, head=128, head_v=128, mask="prefix"),
    Attend("wide heads", heads=8, kv_heads=4, keys=300, head=256, head_v=256, softcap=50.0, mask="prefix"),
]


EVERY_TYPE = [CASES[1], CASES[6], CASES[9]]
RUNS = [(case, torch.bfloat16) for case in [*CASES, *LAYERS]]
RUNS += [(case, dtype) for case in EVERY_TYPE for dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=lambda x: str(x).removeprefix("torch."))
def test_cases(case: Attend, dtype: torch.dtype, tmp_path: Path) -> None:
    launcher = emit_attention(case.graph(dtype), "attend")
    assert isinstance(launcher, Launcher), launcher
    call = loaded(launcher, tmp_path)
    for _ in range(2):
        inputs = case.inputs(dtype, "cuda")
        result = call(*inputs)
        assert result.dtype == dtype
        assert error(result, case.exact(inputs)) < BOUNDS[dtype]
        assert torch.equal(call(*inputs), result)  # no atomics: the same bits at every run
