"""The emitted text: what it holds, that it is the same each time, and why some regions are refused."""

from __future__ import annotations

import ast
import re

import torch

from fuseline.codegen.emitter import emit_region
from fuseline.codegen.kernel import Launcher, Refusal
from fuseline.codegen.kernel_text import live
from fuseline.compiler.ops import quantize, rms_norm
from tests.codegen.regions import emitted, refused, region

aten = torch.ops.aten


def norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + r
    return h, rms_norm(h, w, 1e-6, False, torch.float32)


HALF = torch.randn(2, 5, 576, dtype=torch.bfloat16), torch.randn(2, 5, 576, dtype=torch.bfloat16)
WEIGHT = torch.randn(576, dtype=torch.bfloat16)
SYMBOLIC = {0: (0, 1), 1: (0, 1)}


def test_one_kernel_reads_each_input_once() -> None:
    launcher = emitted(norm, *HALF, WEIGHT, dynamic=SYMBOLIC)
    (kernel,) = launcher.kernels
    assert kernel.source.count("tl.load(") == 3 and kernel.source.count("tl.store(") == 2
    assert kernel.ops == ("aten.add.Tensor", "fuseline.rms_norm.default")


def test_addresses_are_int64_and_tails_are_masked() -> None:
    source = emitted(norm, *HALF, WEIGHT, dynamic=SYMBOLIC).kernels[0].source
    widened = set(re.findall(r"(\w+) = \w+\.to\(tl\.int64\)", source))
    for access in re.findall(r"tl\.(?:load|store)\((.*)", re.sub(r"(?<=[(,])\n *", " ", source)):
        terms = re.findall(r"(\w+) \* \w+_stride_\d", access)
        assert terms and set(terms) <= widened
        assert "mask=" in access and "column_inside" in access
    assert "pid.to(rows.dtype)" in source  # as wide as the number of rows


def test_symbolic_sizes_are_not_baked_in() -> None:
    launcher = emitted(norm, torch.randn(13, 17, 64), torch.randn(13, 17, 64), torch.randn(64), dynamic=SYMBOLIC)
    text = launcher.source + launcher.kernels[0].source
    assert not re.search(r"\b(13|17|221)\b", text)
    assert (
        "rows = x_1.shape[0] * x_1.shape[1]" in launcher.source or "rows = x.shape[0] * x.shape[1]" in launcher.source
    )


def test_nothing_is_read_on_the_host() -> None:
    source = emitted(norm, *HALF, WEIGHT).source
    assert not re.search(r"\.(item|tolist|cpu|numpy|contiguous)\(", source)
    assert "with torch.cuda.device_of(x):" in source


def test_the_text_is_deterministic_and_free_of_running_numbers() -> None:
    def twice(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return rms_norm(x + 1, w, 1e-6)

    first, second = region(twice, [HALF[0], WEIGHT]), region(twice, [HALF[0], WEIGHT])
    for k, node in enumerate(second.graph.nodes):
        if node.op != "output":
            node._rename(f"{node.name.removesuffix('_1')}_{k + 40}")
    a, b = emit_region(first, "f"), emit_region(second, "f")
    assert isinstance(a, Launcher) and isinstance(b, Launcher)
    assert a.kernels[0].source == b.kernels[0].source and a.source == b.source


def test_which_weight_it_is_makes_no_other_kernel() -> None:
    sources = set()
    for name in ("model_layers_0_input_layernorm_weight", "model_norm_weight"):
        graph = region(lambda x, w: rms_norm(x, w, 1e-6), [HALF[0], WEIGHT])
        weight = list(graph.graph.nodes)[1]
        weight._rename(name)
        launcher = emit_region(graph, "f")
        assert isinstance(launcher, Launcher)
        sources.add(launcher.kernels[0].source)
    assert len(sources) == 1 and "weight_ptr" in sources.pop()


def test_a_kernel_says_what_it_serves() -> None:
    graph = region(lambda x: torch.exp(x) + 1, [torch.randn(4)])
    for node in graph.graph.nodes:
        node.meta["stack_trace"] = 'File "/somewhere/modeling.py", line 7, in forward\n    x'
        node.meta["custom"] = {"fuseline": ("fuse/pointwise",)}
    launcher = emit_region(graph, "f")
    assert isinstance(launcher, Launcher)
    assert launcher.kernels[0].lines == ("modeling.py:7",)
    assert launcher.kernels[0].made_by == ("fuse/pointwise",)


def test_constants_and_signature_name_every_argument() -> None:
    kernel = emitted(norm, *HALF, WEIGHT).kernels[0]
    header = kernel.source[kernel.source.index("(", kernel.source.index("def ")) : kernel.source.index("):")]
    assert re.findall(r"(\w+)(?:: tl\.constexpr)?(?=,|$)", header) == list(kernel.signature)
    assert {n for n, kind in kernel.signature.items() if kind == "constexpr"} == set(kernel.constants)
    assert kernel.signature["x_ptr"] == "*bf16"


def test_dead_lines_are_dropped() -> None:
    assert live(["a = 1", "b = a + 1", "c = 2", "tl.store(p, c)"]) == ["c = 2", "tl.store(p, c)"]


def test_reasons() -> None:
    x = torch.randn(4, 6)
    assert "reduces over other dimensions than the last" in refused(lambda x: x.softmax(0), x)
    assert "is not a pointwise op the emitter knows" in refused(lambda x: torch.erfinv(x) + 1, x)
    assert "is not a pointwise op the emitter knows" in refused(lambda x: x @ x.t(), x)
    assert "does not fit the kernel's rows" in refused(lambda x: (x + 1, torch.cat((x, x, x), 0) * 2), x)
    assert "reduces rows that lie across the kernel's rows" in refused(lambda x: x.softmax(-1).t().softmax(-1), x)
    assert "kernels do not hold torch.complex64" in refused(lambda z: z + 1, x.to(torch.complex64))
    assert "several devices" in refused(lambda x: x.to("meta") + 1, x)
    assert refused(lambda x: x, x).startswith("nothing to compute")


def test_a_constant_in_the_graph_is_refused() -> None:
    weight = torch.nn.Parameter(torch.randn(6))

    class Held(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.weight

    graph = torch.fx.symbolic_trace(Held())
    for node in graph.graph.nodes:
        node.meta["val"] = torch.randn(4, 6) if node.op != "get_attr" else weight
        if node.op == "call_function":
            node.target = aten.mul.Tensor
    answer = emit_region(graph, "f")
    assert isinstance(answer, Refusal) and "must be inputs of the region" in answer.reason


def test_sizes_that_no_input_tells_are_refused() -> None:
    graph = region(lambda x: x + 1, [torch.randn(4, 6)], {0: (0, 1)})
    other = region(lambda y, z, x: x + 1, [torch.randn(3), torch.randn(3), torch.randn(5, 7)], {2: (0, 1)})
    (add,), (strange,) = ([n for n in g.graph.nodes if n.op == "call_function"] for g in (graph, other))
    add.meta["val"] = strange.meta["val"]
    answer = emit_region(graph, "f")
    assert isinstance(answer, Refusal) and "no input has the size" in answer.reason


def test_groups_that_are_no_whole_row_run_over_groups() -> None:
    kernel = emitted(lambda x: quantize(x, 8, 24), torch.randn(3, 96)).kernels[0]
    assert kernel.constants["BLOCK"] == 32  # 24 columns


def test_a_long_chain_is_no_deep_recursion() -> None:
    def chain(x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(400):
            y = y * 0.5 + x
        return y.softmax(-1)

    assert emitted(chain, torch.randn(3, 8)).kernels[0].source.count("tl.load(") == 1


def test_names_of_inputs_do_not_clash_with_the_kernels_own() -> None:
    def function(row: torch.Tensor, ROWS: torch.Tensor, tl: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return row + ROWS * tl - n

    launcher = emitted(function, *(torch.randn(3, 8) for _ in range(4)), dynamic=dict.fromkeys(range(4), (0, 1)))
    ast.parse(launcher.kernels[0].source + launcher.source)
    assert launcher.kernels[0].source.count("ROWS: tl.constexpr") == 1
