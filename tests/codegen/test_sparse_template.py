"""The sparse template: what it refuses and why, what its text looks like, and that it compiles without a GPU."""

from __future__ import annotations

import pytest
import torch

from fuseline.codegen.kernel import Launcher, Refusal
from fuseline.codegen.offline import TARGETS, compile_kernel
from fuseline.codegen.templates.sparse import emit_sparse
from fuseline.codegen.templates.sparse_gather import GatherConfig
from fuseline.compiler.ops import dequantize, sparse_linear
from tests.codegen.linear_cases import Format
from tests.codegen.regions import region
from tests.codegen.sparse_cases import CASES, Case

BY_NAME = {case.name: case for case in CASES}


def emitted(case: Case, config: GatherConfig | None = None) -> Launcher:
    launcher = emit_sparse(case.graph(torch.bfloat16), "fused", config)
    assert isinstance(launcher, Launcher), launcher
    return launcher


@pytest.mark.one_in(3)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["gate, up", "int4 g48 zero", "int8 channel"])
def test_compiles_without_a_gpu(name: str, target: str) -> None:
    for compact in (True, False):
        for kernel in emitted(BY_NAME[name], GatherConfig(128, 16, 64, compact)).kernels:
            assert compile_kernel(kernel, target).shared_bytes <= 64 * 1024, "gfx942 has 64 KB a workgroup"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_compiles_without_a_gpu(case: Case, target: str) -> None:
    for kernel in emitted(case).kernels:
        compile_kernel(kernel, target)


def test_codes_are_loaded_in_pieces_and_not_converted() -> None:
    case = Case("layer", 4096, (14336,), Format(4, 128))
    config = GatherConfig(512, 16, 512, compact=True, stages=1)
    ptx = compile_kernel(emitted(case, config).kernels[0], "sm_90").asm["ptx"]
    assert isinstance(ptx, str)
    assert "ld.global.v4.b32" in ptx and "ld.global.b8" not in ptx
    assert "cvt.rn.f32.u" not in ptx


def test_rows_of_kept_channels_are_loaded_in_16_byte_pieces() -> None:
    case = Case("layer", 4096, (14336,))
    for compact in (True, False):
        config = GatherConfig(512, 16, 512, compact=compact, stages=1)
        ptx = str(compile_kernel(emitted(case, config).kernels[0], "sm_90").asm["ptx"])
        assert "ld.global.v4.b32" in ptx
        assert "atom" not in ptx  # sums have an order


def test_the_branch_begins_in_the_first_kernel_and_ends_in_the_second() -> None:
    gather, finish = emitted(BY_NAME["gate, up"]).kernels
    assert "down_ptr" in gather.signature and "up_0_ptr" not in gather.signature
    assert "up_0_ptr" in finish.signature and "down_ptr" not in finish.signature
    assert gather.source.startswith("# sparse_linear (80 x 96 bfloat16, 80 x 96 bfloat16, rank 20) → glu")
    shared = {use.value: use.access for use in gather.buffers if use.shape}
    assert shared == {"index": "write", "parts": "write", "z": "write"}


def refused(function, *inputs: torch.Tensor) -> str:
    answer = emit_sparse(region(function, inputs), "fused")
    assert isinstance(answer, Refusal), answer.source
    return answer.reason


def test_refusals() -> None:
    x, w, t = torch.randn(2, 32), torch.randn(32, 16), torch.ones(1)

    def two_masks(x, w, t, u):
        return sparse_linear(x, w, t), sparse_linear(x, w, u)

    assert refused(two_masks, x, w, t, t.clone()) == "its products have different masks"
    assert "computed in the region" in refused(lambda x, w, t: sparse_linear(x, w, t * 2), x, w, t)
    double = refused(lambda x, w, t: sparse_linear(x, w, t), x.double(), w.double(), t)
    assert double == "float64 input: kernels compute in float32, float16 and bfloat16"
    codes, scale = torch.randint(0, 255, (32, 8), dtype=torch.uint8), torch.rand(32, 16 // 5 + 1)

    def odd(x, codes, scale, t):
        return sparse_linear(x, dequantize(codes, scale, None, 4, 16, x.dtype), t)

    assert isinstance(emit_sparse(region(odd, (x, codes, scale[:, :1], t)), "fused"), Launcher)
