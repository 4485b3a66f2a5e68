"""The template of coded weights: what it refuses and why, what its text looks like, that it compiles without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline.codegen.kernel import Kernel, Launcher, Refusal
from fuseline.codegen.lower import lower
from fuseline.codegen.offline import OTHERS, TARGETS, CompileError, compile_kernel
from fuseline.codegen.templates.anchor import analyse
from fuseline.codegen.templates.coded import config
from fuseline.codegen.templates.coded.config import CodedTiling, Tile
from fuseline.codegen.templates.coded.host import lacking, target_of
from fuseline.codegen.templates.linear import emit_linear
from fuseline.compiler.ops import decode, dequantize
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.products import refuse_codes, refuse_words
from fuseline.compiler.schemes import Scheme
from tests.codegen.coded_cases import CASES, WITH_CODES, Coded
from tests.codegen.regions import region

COMPILED = ("int4:g128 256", "int3:g64 512", "mxfp4 256 glu x2", "nvfp4 128 rms", "ternary:g64 256")
WIDE = Coded("int4:g128", 4096, (4096,))


def emitted(case: Coded, dtype: torch.dtype = torch.bfloat16, tiles: CodedTiling | None = None) -> Launcher:
    launcher = emit_linear(case.graph(5, dtype), "fused", tiles)
    assert isinstance(launcher, Launcher), launcher
    return launcher


@pytest.mark.one_in(4)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_gpu(name: str, target: str) -> None:
    case = next(c for c in CASES if str(c) == name)
    for kernel in emitted(case).kernels:
        compile_kernel(kernel, target)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", [c for c in WITH_CODES if c.k in (256, 300)], ids=str)
def test_products_of_codes_compile_for_hopper(case: Coded) -> None:
    for kernel in emitted(case).kernels:
        compile_kernel(kernel, "sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
@pytest.mark.parametrize("activations", ["int8", "e4m3"])
def test_products_of_codes_are_refused_where_they_do_not_compile(activations: str, target: str) -> None:
    """And nowhere else: what a launch asks a GPU is what Triton says of its architecture."""
    case = next(c for c in WITH_CODES if c.activations == activations and c.k == 256)
    number = int(target.removeprefix("sm_"))
    refused = lacking(torch.int8 if activations == "int8" else torch.float8_e4m3fn, (number // 10, number % 10))
    few = next(k for k in emitted(case).kernels if k.name.endswith("_few"))
    if refused is None:
        compile_kernel(few, target)
    else:
        with pytest.raises(CompileError):
            compile_kernel(few, target)


def test_amds_gpus_multiply_no_codes_of_e4m3() -> None:
    assert "activations=int8" in (lacking(torch.float8_e4m3fn, None) or "")
    assert lacking(torch.int8, None) is None and lacking(torch.bfloat16, (7, 5)) is None


@pytest.mark.slow
@pytest.mark.parametrize("target", OTHERS)
def test_weights_alone_compile_for_every_gpu(target: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for case in (next(c for c in CASES if str(c) == name) for name in COMPILED):
            for kernel in emitted(case, dtype).kernels:
                compile_kernel(kernel, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_compiles_without_a_gpu(case: Coded, target: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kernel in emitted(case, dtype).kernels:
            compile_kernel(kernel, target)


def test_codes_go_to_tensor_cores_without_conversions() -> None:
    """Loads of 16 bytes that run ahead, two codes to an instruction, no conversion of an integer."""
    few, *_, many = emitted(WIDE).kernels
    ptx = str(compile_kernel(few, "sm_90").asm["ptx"])
    assert "mma.sync.aligned.m16n8k16" in ptx and "cp.async.cg.shared.global" in ptx
    assert "wgmma" in str(compile_kernel(many, "sm_90").asm["ptx"])
    assert "cvt.rn.bf16.s" not in ptx and "cvt.rn.f32.s" not in ptx and "cvt.rn.f32.u8" not in ptx


@pytest.mark.parametrize(("case", "instruction"), [(WITH_CODES[1], ".s32.s8.s8"), (WITH_CODES[-1], ".f32.e4m3.e4m3")])
def test_codes_are_multiplied_as_they_are(case: Coded, instruction: str) -> None:
    kernel = emitted(case).kernels[-1]
    assert instruction in str(compile_kernel(kernel, "sm_90").asm["ptx"])


SHARED = {"sm_90": 232448, "sm_80": 166912, "sm_89": 101376}
"""target → bytes of shared memory that one program may use: H100 and H200, A100, L4 and RTX 40."""


def fills(kernel: Kernel, tiles: CodedTiling) -> Kernel:
    """A kernel of few rows for the most that it is given."""
    rows = {"BLOCK_M": tiles.few_rows, "ROWS": tiles.few_rows}
    return replace(kernel, constants={**kernel.constants, **rows}) if kernel.name.endswith("_few") else kernel


def check_shared(case: Coded, dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "shared_memory", lambda device: SHARED[target])
    anchor = analyse(case.graph(5, dtype))
    assert not isinstance(anchor, Refusal)
    tiles = config.tiling(anchor, target_of(anchor))
    for kernel in emitted(case, dtype).kernels:
        found = compile_kernel(fills(kernel, tiles), target).shared_bytes
        assert found <= SHARED[target], (kernel.name, kernel.constants, found)


LARGE = [
    *(Coded(s, 2048, (512,)) for s in ("int4:g128", "int2:g128", "int3:g128", "int5", "int7", "int8", "binary")),
    *(Coded(s, 2048, (512, 128, 128), "rms") for s in ("int4:g128", "int3:g128:sym", "fp8", "binary")),
    *(Coded(s, 2048, (512, 512), "glu") for s in ("int4:g128", "int2:g64", "int7", "nvfp4")),
]


def test_sections_share_one_place_of_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the sides of an if and else they would have one each: 311296 bytes for this case of chunks of 512 channels."""
    case = next(c for c in CASES if str(c) == "int3:g128:sym 1024 rms x2")
    check_shared(case, torch.float16, "sm_90", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_shared_memory_is_enough(case: Coded, dtype: torch.dtype, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared(case, dtype, target, monkeypatch)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_tiles_are_picked_by_the_device(case: Coded, monkeypatch: pytest.MonkeyPatch) -> None:
    """By calculation, which the tests above compare with Triton's; down to the least that Turing has."""
    for dtype in (torch.bfloat16, torch.float32):
        anchor = analyse(case.graph(5, dtype))
        assert not isinstance(anchor, Refusal)
        weight, linears = anchor.linears[0].coded, max(len(s.linears) for s in anchor.sections)
        for room in (*SHARED.values(), 64 << 10):
            monkeypatch.setattr(config, "shared_memory", lambda device, room=room: room)
            tiles = config.tiling(anchor, dtype)
            few = replace(tiles.few, block_m=tiles.few_rows)
            for tile in (few, tiles.many, *([tiles.some] if tiles.some else [])):
                meeting = 1 if tile.split > 1 else linears
                assert config.shared(tile, weight, dtype, meeting) <= room, (tile, room)


def test_partial_sums_are_added_by_a_kernel_of_their_own() -> None:
    few, total, some, many = emitted(WIDE).kernels
    assert "parts_ptr" in few.signature and "linear_out" not in few.signature
    assert [(b.access, b.shape) for b in total.buffers if b.value == "parts"] == [("read", (16, 4096, "rows_in_parts"))]
    assert "parts_ptr" not in {**some.signature, **many.signature} and "atomic" not in few.source + total.source
    whole = emitted(WIDE, tiles=CodedTiling(Tile(16, 64), Tile(128, 128)))
    assert [k.name for k in whole.kernels] == ["fused_few", "fused_many"]


def test_text_says_what_is_read() -> None:
    few = emitted(Coded("int3:g64", 512, (33,))).kernels[0]
    assert "# linear (33 x 512 int3:g64 with zero points)" in few.source
    assert set(few.constants) == {name for name, kind in few.signature.items() if kind == "constexpr"}


def decoded(scheme: str, k: int = 64) -> torch.fx.Node:
    """A weight's expansion in a graph."""
    parsed = Scheme.parse(scheme, weights=True)
    parts = parsed.quantize(torch.randn(8, k))
    codes, rest = parsed.pack(parts.pop("codes")), [parts["scale"], *([parts["zero"]] if "zero" in parts else [])]
    group = parsed.group_of(k)

    def function(codes: torch.Tensor, scale: torch.Tensor, *zeros: torch.Tensor) -> torch.Tensor:
        zero = zeros[0] if zeros else None
        if scheme.startswith("int4") or parsed.format == "int8":
            return dequantize(codes, scale, zero, parsed.bits, group, torch.float32)
        return decode(codes, scale, zero, None, parsed.format, group, True, torch.float32)

    graph = region(function, (codes, *rest)).graph
    return next(n for n in graph.nodes if n.op == "call_function")


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [("int3:g8", "groups of 8: kernels read multiples of 16 (g16)"), ("fp4:g4", "multiples of 16 (g16)"),
     ("int3:g16", None), ("mxfp4", None)],
)  # fmt: skip
def test_layouts_that_there_are_not(scheme: str, reason: str | None) -> None:
    answer = refuse_words(decoded(scheme))
    assert answer is None if reason is None else reason in str(answer)


@pytest.mark.parametrize(
    ("scheme", "codes", "reason"),
    [
        ("fp4:g32", torch.int8, "int8 activations are multiplied with integers, and the weight is e2m1"),
        ("int8:asym", torch.int8, "int8:sym does"),
        ("int3:g16", torch.int8, "products of int8 take multiples of 32"),
        ("int4:g32", torch.float8_e4m3fn, "e4m3 activations are multiplied with e4m3 weights"),
        ("fp8:g32", torch.float8_e4m3fn, "one scale a channel"),
        ("int4:g32", torch.int8, None), ("ternary", torch.int8, None), ("fp8", torch.float8_e4m3fn, None),
    ],
)  # fmt: skip
def test_products_that_there_are_not(scheme: str, codes: torch.dtype, reason: str | None) -> None:
    answer = refuse_codes(decoded(scheme), codes)
    assert answer is None if reason is None else reason in str(answer)


def test_formats_that_do_not_meet_are_refused() -> None:
    first, second = Coded("int4:g32", 96), Coded("int2:g32", 96)
    tensors = [first.inputs(3, torch.float16)[0], *first.weight(8, torch.float16).values()]
    count = len(tensors)
    tensors += second.weight(8, torch.float16).values()

    def both(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        one = F.linear(x, first.decoded(list(rest[: count - 1]), torch.float16))
        return one + F.linear(x, second.decoded(list(rest[count - 1 :]), torch.float16))

    answer = emit_linear(region(both, tensors), "fused")
    assert isinstance(answer, Refusal) and "several formats" in answer.reason and "int2:g32" in answer.reason


@torch.no_grad()
def test_regions_are_laid_out_and_the_program_is_not() -> None:
    """Lowering changes a copy: what exports and eager read stays as the passes left it."""
    model, x = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 8)), torch.randn(3, 64)
    pipeline = Pipeline("quantize{weights=int3:g16},fuse")
    program, _ = pipeline.run(fuseline.capture(model, (x,)))
    before = str(program.module.linear_0.graph)
    lowered = lower(program)
    assert str(program.module.linear_0.graph) == before and "decode_words" not in before
    assert not lowered.refusals and "decode_words" in str(lowered.regions["linear_0"].graph)
    assert sum(type(e).__name__ == "InWords" for e in lowered.weights) == 2
