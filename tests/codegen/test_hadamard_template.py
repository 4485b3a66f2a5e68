"""What is emitted for Hadamard transforms; tests/interpreted and tests/gpu run it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fuseline.codegen.kernel import Kernel
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.resources import resources
from fuseline.codegen.templates.hadamard import LONGEST, SINGLE, layout, power_of_two
from fuseline.compiler.hadamard import factor
from fuseline.compiler.ops import glu, hadamard, quantize
from tests.codegen.hadamard_cases import MODELS, launcher, operands, transform
from tests.codegen.regions import emitted


def contiguous(kernel: Kernel, n: int) -> Kernel:
    """The kernel as a launch over contiguous tensors specialises it: strides of rows and of channels are known."""
    rows = {"arg1": factor(n).order}
    names = [a for a in kernel.signature if "_stride_" in a]
    strides = {a: 1 if a.endswith("_1") else rows.get(a.partition("_")[0], n) for a in names}
    signature = {**kernel.signature, **dict.fromkeys(strides, "constexpr")}
    return replace(kernel, signature=signature, constants={**kernel.constants, **strides})


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("n", [128, 576, 4096, 14336, pytest.param(11008, marks=pytest.mark.slow)])
def test_kernels_compile_for_every_target(n: int, target: str) -> None:
    (kernel,) = launcher(n).kernels
    compiled = compile_kernel(contiguous(kernel, n), target)
    limit = {"sm_80": 99, "sm_90": 227, "gfx942": 64}[target]
    assert compiled.shared_bytes <= limit << 10


@pytest.mark.parametrize("n", [64, 4096, 14336])
def test_nothing_is_spilled_on_hopper(n: int) -> None:
    (kernel,) = launcher(n).kernels
    found = resources(compile_kernel(contiguous(kernel, n), "sm_90"))
    assert found.spill_bytes == 0 and found.registers is not None and found.registers <= 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_types_compile(dtype: torch.dtype) -> None:
    for n in (1536, 8192):
        compiled = compile_kernel(contiguous(launcher(n, dtype).kernels[0], n), "sm_80")
        assert compiled.shared_bytes <= 99 << 10


@pytest.mark.parametrize("n", MODELS)
def test_each_element_is_read_once_and_written_once(n: int) -> None:
    (kernel,) = launcher(n).kernels
    assert kernel.source.count("tl.load(arg0_ptr") == 1 and kernel.source.count("tl.store(") == 1
    assert "barrier" not in kernel.source
    assert kernel.constants["BLOCK"] == power_of_two(n)
    head, walk = kernel.source.split("while pid")
    assert "arg1_ptr +" not in walk  # the core is read before the walk over the rows


@pytest.mark.parametrize("n", [4096, 14336])
def test_butterflies_stay_inside_of_threads(n: int) -> None:
    """Values change their places twice: on their way to the tensor cores, and on their way back to whole rows."""
    (kernel,) = launcher(n).kernels
    graph = str(compile_kernel(contiguous(kernel, n), "sm_90").asm["ttgir"])
    walk = graph[graph.index("scf.while") :]
    assert walk.count("ttg.convert_layout") == 1 and walk.count("ttg.local_alloc") <= 2
    assert walk.count("warp_group_dot ") == 1


def test_the_fused_kernel_writes_codes_and_scales_alone() -> None:
    (core,), signs = operands(1536, torch.bfloat16)

    def rotated(gate, up, core):
        return quantize(transform(1536, signs)(glu(gate, up, "silu"), core), 8, 1536)

    x = torch.randn(3, 1536).bfloat16()
    (kernel,) = emitted(rotated, x, x.clone(), core, dynamic={0: (0,), 1: (0,)}).kernels
    assert kernel.source.count("tl.store(") == 2 and len(re.findall(r"tl.load\((?:gate|up)_ptr", kernel.source)) == 2
    for target in ("sm_80", "sm_90", "gfx942"):
        compile_kernel(kernel, target)
    # with the strides of contiguous tensors, where Triton would reshape the operand of Hopper's product in place
    strides = {
        a: 1 if a.endswith("_1") else 12 if a.startswith("core") else 1536 for a in kernel.signature if "stride" in a
    }
    signature = {**kernel.signature, **dict.fromkeys(strides, "constexpr")}
    known = replace(kernel, signature=signature, constants={**kernel.constants, **strides})
    assert resources(compile_kernel(known, "sm_90")).spill_bytes == 0


@pytest.mark.parametrize(("busy", "single"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("n", [*range(16, 300), *MODELS, 3072, 5120, 9728, 13824, 28672])
def test_cuts_hold_every_channel(n: int, busy: bool, single: bool) -> None:
    cut = layout(n, factor(n).order, busy, single)
    assert cut.rows * cut.columns == n and cut.rows % cut.order == 0
    assert cut.padded % cut.piece == 0 and cut.padded % cut.inner == 0
    blocks = cut.blocks
    if single and cut.block > SINGLE:
        return  # refused
    assert cut.block == power_of_two(n) <= LONGEST and blocks.rows >= blocks.least_rows
    assert blocks.least_rows * cut.columns >= 16
    sums = -(-cut.rows // cut.piece) * cut.piece * cut.columns * blocks.rows
    assert sums <= 128 * 32 * blocks.warps


def test_rows_of_one_program() -> None:
    source = launcher(4096).source
    assert "min(4, triton.next_power_of_2(max(rows, 1)))" in source and "min(264, triton.cdiv(rows, ROWS))" in source
    launched = emitted(hadamard, torch.randn(3, 64).bfloat16(), dynamic={0: (0,)})
    assert "min(32, triton.next_power_of_2(max(rows, 16)))" in launched.source
