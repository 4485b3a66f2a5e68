"""What is emitted for Hadamard transforms; tests/interpreted and tests/gpu run it."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from fuseline.codegen.kernel import Kernel
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.resources import resources
from fuseline.codegen.templates.hadamard_layout import LONGEST, SECOND, SINGLE, layout
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


@pytest.mark.one_in(5)
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("n", [128, 576, 4096, 14336, 11008])
def test_kernels_compile_for_every_target(n: int, target: str) -> None:
    (kernel,) = launcher(n).kernels
    compiled = compile_kernel(contiguous(kernel, n), target)
    limit = {"sm_80": 99, "sm_90": 227, "gfx942": 64}[target]
    assert compiled.shared_bytes <= limit << 10


@pytest.mark.parametrize(("n", "most"), [(64, 0), (4096, 0), (14336, 32), (18944, 0)])
def test_nothing_is_spilled_on_hopper(n: int, most: int) -> None:
    """14336: 64 registers of the next row and 128 sums; two vectors of a row wait in memory."""
    (kernel,) = launcher(n).kernels
    found = resources(compile_kernel(contiguous(kernel, n), "sm_90"))
    assert found.local_bytes is not None and found.local_bytes <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_types_compile(dtype: torch.dtype) -> None:
    for n in (1536, 8192):
        compiled = compile_kernel(contiguous(launcher(n, dtype).kernels[0], n), "sm_80")
        assert compiled.shared_bytes <= 99 << 10


@pytest.mark.parametrize("n", MODELS)
def test_each_element_is_read_once_and_written_once(n: int) -> None:
    (kernel,) = launcher(n).kernels
    cut = layout(n, factor(n).order)
    parts = -(-cut.rows // cut.piece) if cut.parted else 1
    head, walk = kernel.source.split("while pid")
    assert walk.count("tl.load(arg0_ptr") == walk.count("tl.store(") == parts
    assert head.count("tl.load(arg0_ptr") == (parts if cut.parted else 0)  # the first row, ahead of its turn
    assert "barrier" not in kernel.source
    assert ("BLOCK" in kernel.constants) != cut.parted and kernel.constants.get("BLOCK", n) >= n
    assert "arg1_ptr +" not in walk  # the core is read before the walk over the rows


@pytest.mark.parametrize("n", [1024, 4096, 14336])
def test_values_stay_in_their_threads(n: int) -> None:
    """They change their places twice: on their way to the tensor cores, and as 16 bits on their way back to memory."""
    (kernel,) = launcher(n).kernels
    graph = str(compile_kernel(contiguous(kernel, n), "sm_90").asm["ttgir"])
    walk = graph[graph.index("scf.while") :]
    assert walk.count("ttg.local_alloc") <= 2
    # the accumulators become an operand where they lie, and one number a row costs nothing
    moves = [line for line in walk.splitlines() if "ttg.convert_layout" in line]
    (moved,) = [line for line in moves if not re.search(r"x1xf32|-> tensor<\w+, #ttg.dot_op", line)]
    assert "bf16" in moved
    cut = layout(n, factor(n).order)
    assert walk.count("warp_group_dot ") == 1 + (max(1, cut.columns // SECOND) if cut.parted else 0)


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
    assert cut.parted or cut.padded % cut.piece == 0 and cut.padded % cut.inner == 0
    blocks = cut.blocks
    if single and cut.block > SINGLE:
        return  # refused
    assert cut.block >= n and cut.block <= LONGEST and blocks.rows >= blocks.least_rows
    assert blocks.least_rows * cut.columns >= 16
    sums = -(-cut.rows // cut.piece) * cut.piece * cut.columns * blocks.rows
    assert sums <= 128 * 32 * blocks.warps


def test_rows_of_one_program() -> None:
    source = launcher(2048).source
    assert "min(4, triton.next_power_of_2(max(rows, 1)))" in source and "min(264, triton.cdiv(rows, ROWS))" in source
    assert "ROWS=1" in launcher(4096).source and "(min(660, rows),)" in launcher(4096).source
    launched = emitted(hadamard, torch.randn(3, 64).bfloat16(), dynamic={0: (0,)})
    assert "min(32, triton.next_power_of_2(max(rows, 16)))" in launched.source
