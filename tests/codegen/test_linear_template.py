"""The linear template: what it refuses and why, what its text looks like, and that it compiles without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import GraphModule

from fuseline.codegen.kernel import Launcher, Refusal
from fuseline.codegen.module_file import deduplicate, render
from fuseline.codegen.offline import TARGETS, compile_kernel
from fuseline.codegen.templates import config
from fuseline.codegen.templates.anchor import analyse
from fuseline.codegen.templates.linear import emit_linear
from fuseline.compiler.ops import dequantize, layer_norm, rms_norm
from tests.codegen.linear_cases import CASES, Case, Format, gated, quantized, rms
from tests.codegen.regions import region

BY_NAME = {case.name: case for case in CASES}
COMPILED = ["float", "int4 g64", "int4 g144", "int8 channel", "glu int4", "qkv mixed formats", "everything"]


def emitted(graph: GraphModule, name: str = "fused") -> Launcher:
    launcher = emit_linear(graph, name)
    assert isinstance(launcher, Launcher), launcher
    return launcher


def reason(
    function: Callable[..., Any], *inputs: torch.Tensor, dynamic: Mapping[int, Sequence[int]] | None = None
) -> str:
    answer = emit_linear(region(function, inputs, dynamic), "fused")
    assert isinstance(answer, Refusal), answer.source
    return answer.reason


@pytest.mark.one_in(21)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_gpu(name: str, target: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for kernel in emitted(BY_NAME[name].graph(5, dtype)).kernels:
            done = compile_kernel(kernel, target)
            assert done.shared_bytes <= 64 * 1024, "gfx942 has 64 KB a workgroup"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_compiles_without_a_gpu(case: Case, target: str) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for kernel in emitted(case.graph(5, dtype)).kernels:
            compile_kernel(kernel, target)


def test_codes_are_loaded_in_16_byte_pieces_and_not_converted() -> None:
    case = Case("layer", 4096, (6144,), (Format(4, 128),), rms(accumulate=torch.float32), 1)
    ptx = compile_kernel(emitted(case.graph(5, torch.bfloat16)).kernels[0], "sm_90").asm["ptx"]
    assert isinstance(ptx, str)
    assert "ld.global.v4.b32" in ptx and "ld.global.b8" not in ptx
    assert "cvt.rn.f32.u" not in ptx and "cvt.rn.f32.s" not in ptx.replace("cvt.rn.f32.s32", "", 1)


def test_tensor_cores_multiply_tiles() -> None:
    kernel = emitted(BY_NAME["int4 g64"].graph(5, torch.bfloat16)).kernels[1]
    assert "mma.sync" in str(compile_kernel(kernel, "sm_80").asm["ptx"])
    assert "wgmma" in str(compile_kernel(kernel, "sm_90").asm["ptx"])
    assert "mfma" in str(compile_kernel(kernel, "gfx942").asm["amdgcn"])


def test_kernels_read_like_what_they_do() -> None:
    graph = BY_NAME["glu int4"].graph(5, torch.bfloat16)
    for node in graph.graph.nodes:
        node.meta["stack_trace"] = 'File "/home/user/modeling_llama.py", line 174, in forward'
    row, tile = emitted(graph, "mlp").kernels
    for kernel in (row, tile):
        assert "# rms_norm → linear (96 x 192 int4:g64 with zero points, " in kernel.source
        assert "→ glu" in kernel.source
        assert "of weights: their transfer is the floor for one row" in kernel.source
        assert kernel.ops == (
            "fuseline.rms_norm.default", "fuseline.dequantize.default", "aten.linear.default", "fuseline.glu.default",
        )  # fmt: skip
        assert kernel.lines == ("modeling_llama.py:174",)
        assert all(len(line) <= 160 for line in kernel.source.splitlines())
        assert set(kernel.constants) == {name for name, kind in kernel.signature.items() if kind == "constexpr"}
    # one loop reads gate and up: x is loaded once a half
    assert row.source.count("tl.load(x_row + ") == 2
    assert row.source.count("for first") == 1


def test_text_is_deterministic_and_free_of_the_graphs_names() -> None:
    """The same block in two layers, traced apart and with other node names, is one kernel."""
    case = BY_NAME["everything"]
    first, second = case.graph(5, torch.bfloat16), case.graph(5, torch.bfloat16)
    for number, node in enumerate(second.graph.nodes):
        if node.op != "output":
            node._rename(f"m_{number}")
            if node.op == "placeholder":
                node.target = node.name
    a, b = emitted(first, "layer_0"), emitted(second, "layer_1")
    assert [k.source for k in emitted(first, "layer_0").kernels] == [k.source for k in a.kernels]
    merged = deduplicate([a, b])
    assert [k.name for launcher in merged for k in launcher.kernels] == ["layer_0_row", "layer_0_tile"] * 2
    assert render(merged).count("@triton.jit") == 2


def test_sections_of_one_launch_are_branches() -> None:
    row, tile = emitted(BY_NAME["qkv"].graph(5, torch.bfloat16)).kernels
    for kernel in (row, tile):
        assert kernel.source.count("if block < ") == 2
        assert kernel.source.count("tl.store(") == 3


def test_large_weights_are_addressed_with_64_bits() -> None:
    def head(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w)

    meta = torch.device("meta")
    for n, wide in ((128256, False), (600000, True)):
        inputs = (torch.empty(2, 4096, device=meta), torch.empty(n, 4096, device=meta))
        for kernel in emitted(region(head, inputs, {0: (0,)})).kernels:
            assert ("(n.to(tl.int64) * 4096)" in kernel.source) is wide


def test_rows_need_few_programs_or_small_tiles() -> None:
    """The host function picks by the row count, which is not baked in."""
    source = emitted(BY_NAME["float"].graph(5, torch.bfloat16)).source
    assert f"if m <= {config.ROW_KERNEL_MAX}:" in source
    assert f"block_m = {config.FEW_ROWS_BLOCK_M} if m <= {config.FEW_ROWS_MAX} else " in source


def test_tile_sizes_suit_the_format() -> None:
    assert config.row_config(6144, 2048, bits=4) != config.row_config(6144, 2048, bits=8)
    assert config.row_config(960, 576, bits=0).elements == 1024, "one masked step, not two"
    assert config.row_config(64, 32, bits=4).elements == 32, "never more than a row holds"
    for run in (8, 16, 32, 64):
        for itemsize in (2, 4):
            assert config.tile_config(6144, run, itemsize, 1).block_k >= 16, "the least K of tl.dot"


class TestRefusals:
    x = torch.randn(3, 64)
    w = torch.randn(32, 64)

    def test_no_linear(self) -> None:
        assert reason(lambda x: x + 1, self.x) == "the region has no aten.linear"

    def test_float64(self) -> None:
        assert reason(F.linear, self.x.double(), self.w.double()).startswith("float64 input")

    def test_float64_statistics(self) -> None:
        def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(rms_norm(x, None, 1e-5, False, torch.float64), w)

        assert reason(block, self.x, self.w) == "float64 statistics of the norm"

    def test_different_inputs(self) -> None:
        def block(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(x, w) + F.linear(y, w)

        assert "2 different inputs" in reason(block, self.x, self.x + 1, self.w)

    def test_input_computed(self) -> None:
        assert "aten.relu.default before the linear" in reason(lambda x, w: F.linear(x.relu(), w), self.x, self.w)

    def test_two_norms(self) -> None:
        def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            return F.linear(layer_norm(rms_norm(x, None, 1e-5), None, None, 1e-5), w)

        assert "only one norm" in reason(block, self.x, self.w)

    def test_norm_read_elsewhere(self) -> None:
        def block(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            h = rms_norm(x, None, 1e-5)
            return F.linear(h, w[:, :64]) + h

        assert "is computed" in reason(block, self.x, torch.randn(64, 80))

        def shared(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            h = rms_norm(x, None, 1e-5)
            return F.linear(h, w) + h

        assert reason(shared, self.x, torch.randn(64, 64)) == "add reads rms_norm, which is computed inside the product"

    def test_norm_returned(self) -> None:
        def block(x: torch.Tensor, w: torch.Tensor) -> Any:
            h = rms_norm(x, None, 1e-5)
            return F.linear(h, w), h

        assert "rms_norm is returned" in reason(block, self.x, self.w)

    def test_weight_computed(self) -> None:
        assert "is computed by aten.mul" in reason(lambda x, w: F.linear(x, w * 2), self.x, self.w)

    def test_symbolic_inputs_of_the_product(self) -> None:
        assert "last dimension is symbolic" in reason(F.linear, self.x, self.w, dynamic={0: (1,), 1: (1,)})
        assert "number of rows of linear's weight is symbolic" in reason(F.linear, self.x, self.w, dynamic={1: (0,)})

    def test_odd_group(self) -> None:
        def block(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return F.linear(x, dequantize(codes, scale, None, 4, 15, torch.float32))

        codes, scale, _ = quantized(8, 60, 4, 30, False)
        graph = region(block, (torch.randn(2, 60), codes, scale.repeat(1, 2)))
        answer = emit_linear(graph, "fused")
        assert isinstance(answer, Refusal)
        assert answer.reason.startswith("groups of 15 over 60 inputs of linear: the group is even")

    def test_two_bits(self) -> None:
        def block(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            return F.linear(x, dequantize(codes, scale, None, 2, 64, torch.float32))

        assert reason(block, self.x, torch.ones(8, 64, dtype=torch.uint8), torch.ones(8, 1)).startswith("2-bit codes")

    def test_epilogue_unknown(self) -> None:
        assert "aten.softmax.int is not a pointwise op" in reason(
            lambda x, w: torch.softmax(F.linear(x, w), -1), self.x, self.w
        )

    def test_epilogue_of_other_shape(self) -> None:
        answer = reason(lambda x, w, r: F.linear(x, w) + r, torch.randn(2, 3, 64), self.w, torch.randn(3, 32))
        assert answer == "r_1, [3, 32], does not lie over the input's rows by 32 columns"

    def test_output_of_other_shape(self) -> None:
        answer = reason(lambda x, w: F.linear(x, w).view(3, 4, 8), self.x, self.w)
        assert "has shape [3, 4, 8], not the input's rows by 32" in answer

    def test_widths_meet(self) -> None:
        answer = reason(lambda x, w, v: F.linear(x, w) * F.linear(x, v), self.x, self.w, torch.randn(1, 64))
        assert answer == "linears of [1, 32] columns meet in one epilogue"

    def test_output_unrelated_to_a_linear(self) -> None:
        answer = reason(lambda x, w, r: (F.linear(x, w), r * 2), self.x, self.w, torch.randn(3, 32))
        assert answer == "an output does not depend on any linear"

    def test_transposed_output(self) -> None:
        residual = torch.randn(3, 2, 32).transpose(0, 1)
        x = torch.randn(3, 2, 64).transpose(0, 1)
        assert "is not contiguous" in reason(lambda x, w, r: r + F.linear(x, w), x, self.w, residual)

    def test_size_in_the_epilogue(self) -> None:
        answer = reason(lambda x, w: F.linear(x, w) * x.shape[0], self.x, self.w, dynamic={0: (0,)})
        assert "sym_size" in answer and "is not a tensor" in answer

    def test_size_as_an_input_of_the_epilogue(self) -> None:
        graph = region(lambda x, w, s: F.linear(x, w) * s, (self.x, self.w, 5))
        assert emit_linear(graph, "fused") == Refusal("s_1 is not a tensor")


def test_gate_and_up_share_a_section_with_an_extra_output() -> None:
    def block(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, q: torch.Tensor) -> Any:
        g, u = F.linear(x, gate), F.linear(x, up)
        return gated(g, u), F.linear(x, q), u

    inputs = (torch.randn(3, 32), torch.randn(16, 32), torch.randn(16, 32), torch.randn(8, 32))
    launcher = emitted(region(block, inputs, {0: (0,)}))
    assert launcher.kernels[0].source.count("if block < ") == 1, "two sections: gate with up, and q"
    # results are returned in the graph's order, whatever the order of the sections
    assert "return (glu_out, linear_2_out, linear_1_out)" in launcher.source
    assert {o.parameter: o.result for o in launcher.outs} == {"glu_out": 0, "linear_1_out": 2, "linear_2_out": 1}


def test_benchmark_candidates_are_all_emitted() -> None:
    """The sweep's own regions and tiles, without a GPU: each candidate is a kernel, and no two are the same."""
    from benchmarks import linear_kernels as sweep

    options = sweep.parse(["--shapes", "smollm2.gate_up", "--formats", "int4", "--rows", "8"])
    assert (options.shapes, options.formats, options.rows) == (["smollm2.gate_up"], ["int4"], 8)
    for rows in (1, 8):
        problem = sweep.Problem("smollm2.gate_up", "int4", rows)
        graph = problem.graph()
        anchor = analyse(graph)
        assert not isinstance(anchor, Refusal), anchor.reason
        tried = list(dict.fromkeys(sweep.candidates(problem, config.tiling(anchor))))
        assert len(tried) > 10
        for tiles in tried:
            launcher = emit_linear(graph, "bench", tiles)
            assert isinstance(launcher, Launcher)
            kernel = sweep.chosen(launcher, tiles, rows)
            assert kernel.name == ("bench_row" if rows == 1 else "bench_tile")
