"""The template of routed experts: what it refuses and why, what its text looks like; it compiles without a GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import fuseline
from fuseline.codegen.kernel import Kernel, Launcher, Refusal
from fuseline.codegen.lower import lower
from fuseline.codegen.offline import TARGETS, compile_kernel
from fuseline.codegen.resources import resources
from fuseline.codegen.templates.experts.words import SCALES, tile
from fuseline.codegen.templates.moe import emit_moe
from fuseline.codegen.templates.text import Text
from fuseline.compiler.formats.pairs import TOP, unpack_slot
from fuseline.compiler.ops import moe, moe_pairs
from tests.codegen.moe_cases import CASES, CODED, LOW_RANK, PAIR_CODED, PAIRS, Case, Layer
from tests.codegen.regions import region

LAYER = Case("layer", width=512, inner=256, experts=16, top=4)
BY_NAME = {case.name: case for case in [LAYER, *CASES, *PAIRS, *CODED, *PAIR_CODED, *LOW_RANK]}

FEW_BITS = ("pairs in int4:g64", "pairs in fp8:channel", "int3:g64 with ranks")


def emitted(case: Case, dtype: torch.dtype = torch.bfloat16) -> Launcher:
    launcher = emit_moe(case.graph(dtype), "fused")
    assert isinstance(launcher, Launcher), launcher
    return launcher


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ["plain", "odd sizes", "clamped", "pairs and alone", "int4:g32", "fp8", *FEW_BITS])
def test_compiles_without_a_gpu(name: str) -> None:
    for kernel in emitted(BY_NAME[name]).kernels:
        compile_kernel(kernel, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", list(BY_NAME.values()), ids=str)
def test_every_case_compiles_for_every_target(case: Case, target: str) -> None:
    for kernel in emitted(case).kernels:
        compile_kernel(kernel, target)


def ptx(case: Case, tag: str, target: str = "sm_90") -> str:
    compiled = compile_kernel(kernel(case, tag), target)
    assert (resources(compiled).spill_bytes or 0) <= 256, tag
    return str(compiled.asm["ptx"])


def test_products_run_on_tensor_cores_from_shared_memory() -> None:
    for tag in ("up_few", "down_few", "up_many", "down_many"):
        assert "wgmma.mma_async" in ptx(LAYER, tag) and "cp.async.cg.shared.global" in ptx(LAYER, tag)


def test_the_words_of_a_pair_are_loaded_once_for_both_experts() -> None:
    """As many instructions load them as for one expert, and twice as many products are taken."""
    pairs = Case("pairs", width=512, inner=256, experts=16, top=4, pairs=8)
    for tag, products in (("up_few", 2), ("up_many", 1)):
        loops = re.split("    if slot [=!]= ", kernel(pairs, tag).source)[1:]
        assert [loop.count("tl.load(gate_rows") for loop in loops] == [loop.count("tl.load(up_rows") for loop in loops]
        assert [loop.count("tl.dot(") for loop in loops] == [2] + [2 * products] * (len(loops) - 1)


@pytest.mark.parametrize("tag", ["up_few", "down_few", "up_many", "down_many"])
def test_words_of_pairs_reach_the_operand_in_one_move(tag: str) -> None:
    """From swizzled shared memory to registers, where both experts' masks are taken, then to the tensor cores: nothing
    goes back to shared memory, and shared memory holds what is read ahead and no more."""
    case = Case("pairs", width=512, inner=512, experts=16, top=4, pairs=8)
    compiled = compile_kernel(kernel(case, tag), "sm_90")
    text = str(compiled.asm["ttgir"])
    loops = text[text.index("scf.for") : text.rindex("scf.yield")]
    words = re.findall(r"ttg.local_load .*xi16, (#\w+), .*-> tensor<\w+xi16, (#ttg.dot_op<)?", loops)
    assert words and all(kept for _, kept in words)
    assert all(re.search(rf"^{shared} = .*maxPhase = [248]", text, re.MULTILINE) for shared, _ in words)
    assert "local_alloc %" not in loops and "local_store" not in loops
    assert (resources(compiled).spill_bytes or 0) == 0
    text = str(compiled.asm["ptx"])
    assert "wgmma.mma_async" in text and "st.shared" not in text.partition("wgmma.mma_async")[0]
    assert "0xafffafff" in text  # two numbers an instruction


def test_masks_of_pairs_give_what_slots_hold() -> None:
    """The instructions, run by hand on every word: times a power of two the slot's number, or as good as nothing."""
    words = torch.arange(2**16)
    for slot in (0, 1):
        text = Text()
        tile(text, "made", "words", slot)
        known: dict[str, torch.Tensor] = {"$1": words}
        for name, to, first, second in re.findall(r"(\w+)\.b32 (\S+), (\S+), (\S+);", str(text)):
            a, b = known[first], known[second] if second in known else int(second, 0) & 0xFFFF
            known[to] = {"and": a & b, "or": a | b, "shl": a << (b if name == "shl" else 0)}[name] & 0xFFFF
        value = known["$0"].to(torch.int16).view(torch.bfloat16).double() * SCALES[slot]
        held = words >> (13 - slot) & 1 == 1
        assert torch.equal(value[held], unpack_slot(words.to(torch.int16), slot).double()[held])
        assert (value[~held].abs() <= 2.0**-32 * TOP).all()


@pytest.mark.parametrize("name", ["pairs in int4:g64", "pairs in fp8:g128"])
def test_pairs_of_few_bits_are_decoded_once_for_both_experts(name: str) -> None:
    """Their words are loaded, and made magnitudes, as often as for one expert; twice as many products are taken."""
    both, one = (kernel(BY_NAME[name], f"up_{kind}").source for kind in ("few", "many"))
    for once in ("tl.load(chunk_gate", "w_gate = size_gate * w_gate", "gate_up_scale_ptr +"):
        assert both.count(once) == one.count(once) > 0
    assert both.count("tl.dot(") == 2 * one.count("tl.dot(")


@pytest.mark.parametrize("name", ["int4:g32", "nvfp4", "pairs in int4:g64"])
def test_scales_are_loaded_a_turn_ahead(name: str) -> None:
    """Those of the first turn before the loop; in it those of the next one, when its own are used up."""
    case = replace(BY_NAME[name], width=512, inner=512)
    for tag in ("up_few", "down_many"):
        before, loop = kernel(case, tag).source.split("    for turn in ")
        ahead = loop.index("ahead = tl.minimum(turn + 1, ")
        own = loop.index("scale_down = " if "down" in tag else "scale_gate = ")
        assert loop.count("ahead = ") == 1 and own < ahead
        assert loop.count("_scale_ptr +") == before.count("_scale_ptr +") > 0
        assert ahead < loop.index("_scale_ptr +")


def test_experts_have_low_ranks_of_their_own() -> None:
    """Programs and turns beyond an expert's rank end; codes of factors are multiplied as they are."""
    case = BY_NAME["int3:g64 with ranks"]
    launcher = emitted(case)
    assert [k.name for k in launcher.kernels if "low" in k.name] == [
        f"fused_low_{tag}_{kind}" for kind in ("one", "few", "many") for tag in ("up", "down")
    ]
    low, up = kernel(case, "low_up_few").source, kernel(case, "up_few").source
    assert "if block * BLOCK_N >= rank:" in low and "for r0 in range(0, rank, 16):" in up
    assert "low_down_scale_ptr" in low and "low_up_scale_ptr" in low and "low_up_scale_ptr" not in up
    assert f"low = torch.empty((s, 48), dtype={torch.bfloat16}, device=x.device)" in launcher.source


def kernel(case: Case, tag: str) -> Kernel:
    (found,) = (k for k in emitted(case).kernels if k.name == f"fused_{tag}")
    return found


def test_one_token_reads_16_bytes_at_once() -> None:
    for case in (LAYER, Case("pairs", width=512, inner=256, experts=16, top=4, pairs=8)):
        for tag in ("up_one", "down_one"):
            text = ptx(case, tag)
            assert "ld.global.v4.b32" in text and "atom" not in text


def test_one_token_of_pairs_waits_for_their_places_once() -> None:
    """`up` looks an expert up, `down` reads what it found; both multiply the halves of words by themselves."""
    pairs = Case("pairs", width=512, inner=256, experts=16, top=4, pairs=8)
    up, down = kernel(pairs, "up_one"), kernel(pairs, "down_one")
    assert "tl.store(places_ptr" in up.source and "tl.load(places_ptr" in down.source
    assert not {"indices_ptr", "rows_ptr", "slots_ptr"} & down.signature.keys()
    assert up.signature["gate_up_ptr"] == down.signature["down_ptr"] == "*i32"
    assert "* x_left +" not in up.source + down.source


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


MILO = "merge-experts{method=milo,weights=int3:g64,rounds=1,"
MERGED = {
    "merge-experts{saliency=magnitude,pack=int4}": "gate_up_codes_ptr",
    "merge-experts{saliency=magnitude,pack=fp8,group=0}": "slots_ptr",
    f"{MILO}rank=2}}": "gate_up_low_up_scale_ptr",
    f"{MILO}rank=2,compensator=none}}": "gate_up_low_up_ptr",
    f"{MILO}rank=3,ranks=kurtosis,compensator=int4:g64}}": "gate_up_starts_ptr",
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("step", MERGED)
def test_merged_experts_are_read_as_they_are_packed(step: str) -> None:
    """The region takes in what decodes pairs, and low ranks; an odd expert among them."""
    case = Case("layer", width=64, inner=64, experts=5)
    with torch.no_grad():
        program = fuseline.capture(Layer(case).eval(), (torch.randn(5, 64),))
        program, _ = fuseline.Pipeline(f"raise{{allow_empty}},{step},fuse").run(program)
    lowered = lower(program)
    assert not lowered.refusals
    assert MERGED[step] in {argument for k in lowered.kernels for argument in k.signature}
    left = {getattr(n.target, "_opname", "") for n in lowered.graph.nodes if n.op == "call_function"}
    assert not left & {"moe", "decode_pairs", "lowrank_add"}
