"""What the attention template emits and refuses; tests/interpreted and tests/gpu run it."""

from __future__ import annotations

import re

import pytest
import torch

from fuseline.codegen.kernel import Launcher, Refusal
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.templates.attention import ROWS_MAX, emit_attention
from fuseline.compiler.ops import attention
from tests.codegen.attention_cases import CASES, Attend
from tests.codegen.regions import region


def emitted(case: Attend, dtype: torch.dtype = torch.bfloat16) -> Launcher:
    launcher = emit_attention(case.graph(dtype), "attend")
    assert isinstance(launcher, Launcher), launcher
    return launcher


def refused(function: object, *inputs: torch.Tensor) -> str:
    answer = emit_attention(region(function, inputs), "attend")  # type: ignore[arg-type]
    assert isinstance(answer, Refusal), answer
    return answer.reason


@pytest.mark.one_in(10)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["cache", "lowest", "sliding", "odd head"])
def test_kernels_compile_for_every_target(name: str, target: str) -> None:
    case = next(c for c in CASES if c.name == name)
    for kernel in emitted(case).kernels:
        compile_kernel(kernel, target)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [64, 128, 256])
def test_shared_memory_is_that_of_a_small_gpu(head: int, dtype: torch.dtype) -> None:
    split = emitted(Attend("wide", head=head, head_v=head, mask="bool"), dtype).kernels[0]
    assert split.constants["BLOCK_T"] >= 16
    assert compile_kernel(split, "sm_80").shared_bytes <= 99 << 10


def test_what_is_hidden_is_not_read() -> None:
    (split, _) = emitted(Attend("mask", mask="bool")).kernels
    test = split.source.index("if tl.max(tl.max(seen")
    assert test < split.source.index("k = tl.load") and test < split.source.index("v = tl.load")
    assert split.source.index("tl.load(mask_rows") < test


def test_a_kernel_holds_only_what_its_mask_needs() -> None:
    plain = emitted(Attend("plain")).kernels[0]
    assert "mask_ptr" not in plain.signature and "offset" not in plain.signature and "tl.exp(" not in plain.source
    sliding = emitted(Attend("sliding", kind="sliding", offset=3, window=2, mask="bool")).kernels[0]
    assert {"mask_ptr", "offset", "window"} <= set(sliding.signature)


def test_layers_that_differ_in_sizes_alone_share_their_kernels() -> None:
    one, other = emitted(Attend("a", keys=9)), emitted(Attend("b", keys=700, batch=2))
    assert [k.source for k in one.kernels] == [k.source for k in other.kernels]


def test_many_queries_stay_with_pytorch() -> None:
    source = emitted(Attend("any")).source
    assert re.search(rf"if rows > {ROWS_MAX} .*:  # many queries.*\n\s+return torch.ops.fuseline.attention", source)


def test_refusals_name_the_fact() -> None:
    q = torch.randn(1, 2, 1, 512)
    call = lambda q, k, v: attention(q, k, v, None, 1.0, "full")
    assert "heads of 512" in refused(call, q, q, q)
    assert "torch.float64" in refused(call, *[q.double()[..., :64]] * 3)
    dropped = lambda q, k, v: attention(q, k, v, None, 1.0, "full", 0, 0, 0.0, 0.1)
    assert refused(dropped, *[q[..., :64]] * 3) == "attention with dropout"
    assert refused(lambda x: x + 1, q) == "the region is not one attention"
