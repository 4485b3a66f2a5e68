"""Kernels that may begin while those before them end: what their text says, and that it compiles."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from fuseline.codegen.dependent import MARK, dependent
from fuseline.codegen.kernel import Kernel, Launcher, Refusal
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.templates.append import emit_append
from fuseline.codegen.templates.linear import emit_linear
from fuseline.codegen.templates.sparse import emit_sparse
from fuseline.compiler.early_launch import CONSTANT
from fuseline.compiler.ops import rms_norm
from tests.codegen.append_cases import CASES as APPENDS, inputs, made, step
from tests.codegen.coded_cases import Coded
from tests.codegen.linear_cases import CASES as LINEARS
from tests.codegen.regions import emitted
from tests.codegen.sparse_cases import CASES as SPARSE

WAIT, BEGIN = "tl.extra.cuda.gdc_wait()", "tl.extra.cuda.gdc_launch_dependents()"
MEMORY = re.compile(r"tl\.(load|store|atomic\w*)\(")


def launchers() -> Iterator[Launcher | Refusal]:
    yield emit_linear(Coded("int4:g128", 1024, (512, 256), "rms").graph(5, torch.bfloat16), "coded")
    yield emit_linear(LINEARS[0].graph(5, torch.bfloat16), "plain")
    case = APPENDS[0]
    yield emit_append(made(step(*case[-3:]), tuple(inputs(case, torch.bfloat16).values())), "append")
    x, weight = torch.randn(4, 64, dtype=torch.bfloat16), torch.randn(64, dtype=torch.bfloat16)
    yield emitted(lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    yield emit_sparse(next(case for case in SPARSE if case.rank).graph(torch.bfloat16), "sparse")


KERNELS = {kernel.name: kernel for one in launchers() for kernel in dependent(one).kernels}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_waits_before_it_touches_memory(name: str) -> None:
    kernel = KERNELS[name]
    assert MARK not in kernel.source
    assert kernel.constants[CONSTANT] is False and list(kernel.signature)[-1] == CONSTANT
    assert f"{CONSTANT}: tl.constexpr = False" in kernel.source, "who does not know of it launches the kernel plainly"
    first = MEMORY.search(kernel.source)
    assert first and kernel.source.count(WAIT) == 1 and kernel.source.index(WAIT) < first.start()
    assert BEGIN in kernel.source


@pytest.mark.parametrize("name", KERNELS)
def test_it_compiles_for_hopper_and_others_have_none_of_it(name: str) -> None:
    kernel = KERNELS[name]
    early = replace(kernel, constants={**kernel.constants, CONSTANT: True})
    ptx = str(compile_kernel(early, "sm_90").asm["ptx"])
    first = re.search(r"(ld|cp\.async\S*)\.global|\.shared\.global", ptx)
    assert first and 0 <= ptx.index("griddepcontrol.wait") < first.start()
    assert "griddepcontrol.launch_dependents" in ptx
    assert "griddepcontrol" not in str(compile_kernel(kernel, "sm_80").asm["ptx"])


def test_programs_that_gather_are_long() -> None:
    """Each of their ends lets the next kernel begin, none does so before its loop."""
    source = KERNELS["sparse_gather"].source
    loops = [found.start() for found in re.finditer(r"for c\w* in", source)]
    assert len(loops) > 1 and source.count(BEGIN) == len(loops)
    assert all(source.find(BEGIN, start) < source.find("tl.store(", start) for start in loops)
    assert source.index(BEGIN) > loops[0]


SOURCE = """# a comment with a bracket ):
@triton.jit
def add({parameters}):
    k = tl.arange(0, 16)
    x = tl.load(x_ptr + k)
{mark}    tl.store(x_ptr + k, x + 1)
"""


@pytest.mark.parametrize("parameters", ["x_ptr, M", "\n    x_ptr, M,\n"], ids=["a line", "lines"])
@pytest.mark.parametrize("marked", [False, True])
def test_where_the_next_kernel_may_begin(parameters: str, marked: bool) -> None:
    source = SOURCE.format(parameters=parameters, mark=f"    {MARK}\n" if marked else "")
    kernel = Kernel("add", source, {"x_ptr": "*fp32", "M": "i32"}, {})
    [changed] = dependent(Launcher("run", "", (kernel,))).kernels
    begins, waits, loads = (changed.source.index(text) for text in (BEGIN, WAIT, "tl.load("))
    assert waits < loads
    assert (loads < begins) if marked else (begins < waits)
    assert "griddepcontrol.wait" in compile_kernel(replace(changed, constants={CONSTANT: True}), "sm_90").asm["ptx"]  # type: ignore[operator]
