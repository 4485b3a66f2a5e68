"""The template of routed experts: what it refuses and why, what its text looks like; it compiles without a GPU."""

from __future__ import annotations

import pytest
import torch

import fuseline
from fuseline.codegen.kernel import Launcher, Refusal
from fuseline.codegen.lower import lower
from fuseline.codegen.offline import TARGETS, compile_kernel
from fuseline.codegen.resources import resources
from fuseline.codegen.templates.moe import emit_moe
from fuseline.compiler.ops import moe, moe_pairs
from tests.codegen.moe_cases import CASES, CODED, PAIRS, Case, Layer
from tests.codegen.regions import region

LAYER = Case("layer", width=512, inner=256, experts=16, top=4)
BY_NAME = {case.name: case for case in [LAYER, *CASES, *PAIRS, *CODED]}


def emitted(case: Case, dtype: torch.dtype = torch.bfloat16) -> Launcher:
    launcher = emit_moe(case.graph(dtype), "fused")
    assert isinstance(launcher, Launcher), launcher
    return launcher


@pytest.mark.parametrize("name", ["plain", "odd sizes", "clamped", "pairs and alone", "int4:g32", "fp8"])
def test_compiles_without_a_gpu(name: str) -> None:
    for kernel in emitted(BY_NAME[name]).kernels:
        compile_kernel(kernel, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", [LAYER, *CASES, *PAIRS, *CODED], ids=str)
def test_every_case_compiles_for_every_target(case: Case, target: str) -> None:
    for kernel in emitted(case).kernels:
        compile_kernel(kernel, target)


def ptx(case: Case, tag: str, target: str = "sm_90") -> str:
    (kernel,) = (k for k in emitted(case).kernels if k.name == f"fused_{tag}")
    compiled = compile_kernel(kernel, target)
    assert (resources(compiled).spill_bytes or 0) <= 256, tag
    return str(compiled.asm["ptx"])


def test_products_run_on_tensor_cores_from_shared_memory() -> None:
    for tag in ("up_few", "down_few", "up_many", "down_many"):
        assert "wgmma.mma_async" in ptx(LAYER, tag) and "cp.async.cg.shared.global" in ptx(LAYER, tag)


def test_the_words_of_a_pair_are_loaded_once_for_both_experts() -> None:
    """As many instructions load them as for one expert, and twice as many products are taken."""
    pairs = Case("pairs", width=512, inner=256, experts=16, top=4, pairs=8)
    (kernel,) = (k for k in emitted(pairs).kernels if k.name == "fused_up_few")
    assert kernel.source.count("tl.load(gate_rows") == kernel.source.count("tl.load(up_rows") == 1
    assert kernel.source.count("tl.dot(") == 4
    assert "shr" not in "".join(line for line in kernel.source.splitlines() if "words_gate &" in line)
    assert "wgmma.mma_async" in ptx(pairs, "up_few")


def test_one_token_reads_16_bytes_at_once() -> None:
    for case in (LAYER, Case("pairs", width=512, inner=256, experts=16, top=4, pairs=8)):
        for tag in ("up_one", "down_one"):
            text = ptx(case, tag)
            assert "ld.global.v4.b32" in text and "atom" not in text


def test_the_text_of_a_launch() -> None:
    launcher = emitted(LAYER)
    names = [k.name.removeprefix("fused_") for k in launcher.kernels]
    assert names == ["up_one", "down_one", "route_few", "up_few", "down_few", "up_many", "down_many", "sum"]
    assert launcher.kernels[0].source.startswith("# 4 of 16 experts, bfloat16 512 x 256, silu\n")
    scratch = {u.value: u.access for k in launcher.kernels for u in k.buffers if u.shape and u.access == "write"}
    assert set(scratch) == {"order", "table", "act", "parts"}
    assert "cpu()" not in launcher.source and "item()" not in launcher.source  # nothing waits for the device


def refused(function, *inputs: torch.Tensor) -> str:
    answer = emit_moe(region(function, inputs), "fused")
    assert isinstance(answer, Refusal), answer.source
    return answer.reason


def test_refusals() -> None:
    plain = CASES[0].inputs(3, torch.float32, 0)
    assert refused(lambda *t: moe(*t), *(t.double() if t.is_floating_point() else t for t in plain)) == (
        "tokens of torch.float64: kernels compute in float32, float16 and bfloat16"
    )
    pairs = PAIRS[0].inputs(3, torch.float16, 0)
    assert refused(lambda *t: moe_pairs(*t), *pairs) == "packed pairs are bfloat16, and the tokens torch.float16"
    odd = Case("odd", width=35, inner=16, pairs=2)
    reason = refused(lambda *t: moe_pairs(*t), *odd.inputs(3, torch.bfloat16, 0))
    assert reason == "rows of gate_up that are not whole pairs of neighbouring words"

    def two(*t):
        return moe(*t) + moe(*t)

    assert refused(two, *plain) == "the region is not one call of routed experts"


def test_fuse_gives_each_layer_a_region_that_lowering_serves() -> None:
    dynamic = {"x": {0: torch.export.Dim.AUTO}}
    program = fuseline.capture(Layer(CASES[0]).eval(), (torch.randn(5, CASES[0].width),), {}, dynamic)
    apart, _ = fuseline.Pipeline("fuse{experts=false}").run(program)
    assert any(n.target is moe.overload for n in apart.graph.nodes)
    program = fuseline.capture(Layer(CASES[0]).eval(), (torch.randn(5, CASES[0].width),), {}, dynamic)
    program, _ = fuseline.Pipeline("fuse").run(program)
    lowered = lower(program)
    assert not lowered.refusals
    assert {k.ops for k in lowered.kernels if "up_few" in k.name} == {("fuseline.moe.default",)}


@pytest.mark.parametrize("scheme, served", [("int4:g16", True), ("int3:g48", True), ("int4:g24", False)])
def test_rounded_experts_are_read_as_codes(scheme: str, served: bool) -> None:
    """`quantize` gives both stacks as codes; the region takes them in where the kernels read that format."""
    case = Case("layer", width=48, inner=48)
    program = fuseline.capture(Layer(case).eval(), (torch.randn(5, 48),))
    program, _ = fuseline.Pipeline(f"quantize{{weights={scheme},skip=router}},fuse").run(program)
    lowered = lower(program)
    assert not lowered.refusals
    (up,) = (k for k in lowered.kernels if k.name.endswith("up_few"))
    assert ("gate_up_codes_ptr" in up.signature) == served
