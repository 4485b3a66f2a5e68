"""Hadamard transforms in kernels, against eager in float64: sizes, types, cores, what comes before and after.

In float16: the interpreter multiplies the bits of bfloat16 tiles as integers. bfloat16 is in tests/gpu.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fuseline.compiler.hadamard import core, factor, random_signs
from fuseline.compiler.ops import glu, hadamard, quantize
from tests.codegen.regions import check, emitted, loaded, refused


def dense(n: int) -> tuple[torch.Tensor, ...]:
    """The core of n, where it has one."""
    order = factor(n).order
    return (core(order),) if order > 1 else ()


SIZES = [16, 32, 64, 128, 512, 12, 24, 48, 96, 576, 768, 20, 28 * 32, 148, 172, 172 * 2, 148 * 4, 100 * 2, 108, 47, 94]


@pytest.mark.parametrize("n", SIZES)
def test_size(n: int, tmp_path: Path) -> None:
    others = [(torch.randn(rows, n).half(), *dense(n)) for rows in (1, 2, 7)]
    check(hadamard, torch.randn(3, n).half(), *dense(n), dynamic={0: (0,)}, run=others, folder=tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("n", [64, 96, 94])
def test_type(n: int, dtype: torch.dtype, tmp_path: Path) -> None:
    check(hadamard, torch.randn(2, 3, n).to(dtype), *dense(n), folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4096, 14336, 11008, 18944])
def test_sizes_of_models(n: int, tmp_path: Path) -> None:
    check(hadamard, torch.randn(3, n).half(), *dense(n), dynamic={0: (0,)}, folder=tmp_path)


@pytest.mark.parametrize("n", [172, 28 * 4])
def test_signs_in_the_type_of_the_input(n: int, tmp_path: Path) -> None:
    check(lambda x, c: hadamard(x, c, n, True), torch.randn(3, n).half(), dense(n)[0].half(), folder=tmp_path)


def test_a_core_that_is_not_symmetric(tmp_path: Path) -> None:
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q.contiguous()
    for x in (torch.randn(2, 40), torch.randn(2, 40).half()):
        check(hadamard, x, rotation, folder=tmp_path)
        check(hadamard, x, rotation.float().t(), folder=tmp_path)


def test_blocks(tmp_path: Path) -> None:
    block = lambda x, c: hadamard(x, c, 48)
    others = [(torch.randn(rows, 144), core(12)) for rows in (1, 5)]
    check(block, torch.randn(3, 144), core(12), dynamic={0: (0,)}, run=others, folder=tmp_path)
    check(lambda x: hadamard(x, None, 32) * 2, torch.randn(2, 2, 96).half(), folder=tmp_path)


@pytest.mark.parametrize("n", [64, 96, 1024, 4096])
def test_one_row(n: int, tmp_path: Path) -> None:
    check(hadamard, torch.randn(1, n).half(), *dense(n), folder=tmp_path)
    check(hadamard, torch.randn(1, 1, n), *dense(n), folder=tmp_path)
    check(hadamard, torch.randn(n).half(), *dense(n), folder=tmp_path)
    one_for_all = lambda y, x, *c: hadamard(x, *c) + y
    check(one_for_all, torch.randn(5, n), torch.randn(1, n), *dense(n), folder=tmp_path)
    check(lambda x, *c: quantize(hadamard(x, *c), 8, n)[1], torch.randn(1, n), *dense(n), folder=tmp_path)


def test_strides(tmp_path: Path) -> None:
    heads = torch.randn(2, 3, 4, 64)
    check(hadamard, heads.transpose(1, 2), folder=tmp_path)
    check(hadamard, torch.randn(64, 5).t(), folder=tmp_path)
    check(hadamard, torch.randn(2, 1, 64).expand(2, 3, 64), folder=tmp_path)


def test_what_comes_before_and_after(tmp_path: Path) -> None:
    signs = torch.tensor(random_signs(96, 0), dtype=torch.float16)
    gate, up = torch.randn(2, 5, 96).half(), torch.randn(2, 5, 96).half()

    def online(gate, up, signs, c):
        return hadamard(glu(gate, up, "silu") * signs, c).float() + 1

    wide = (gate, up, signs, core(12))  # the gated product is rounded to 16 bits on the way
    check(online, *wide, dynamic={0: (1,), 1: (1,)}, folder=tmp_path, bound=3e-3)
    # padding is no number before the transform, and must not reach it
    check(lambda x, c: hadamard(1 / x, c), torch.rand(3, 24) + 0.5, core(12), folder=tmp_path)
    check(lambda x: (hadamard(x), x + 1), torch.randn(3, 64), folder=tmp_path)
    check(lambda x: hadamard(hadamard(x) * 2), torch.randn(3, 64), folder=tmp_path)


@pytest.mark.parametrize("n", [64, 96, 576])
def test_codes_come_out_of_the_same_kernel(n: int, tmp_path: Path) -> None:
    def rotated(gate, up, *c):
        return quantize(hadamard(glu(gate, up, "silu"), *c), 8, n)

    inputs = torch.randn(6, n).half(), torch.randn(6, n).half(), *dense(n)
    launcher = emitted(rotated, *inputs, dynamic={0: (0,), 1: (0,)})
    assert len(launcher.kernels) == 1
    (codes, scale), call = rotated(*inputs), loaded(launcher, tmp_path)
    found, found_scale = call(*inputs)
    assert (found.int() - codes.int()).abs().max() <= 1 and ((found_scale - scale).abs() / scale).max() < 1e-2
    # against the transform in float64, which the kernel does not round to 16 bits before the codes
    exact = hadamard(F.silu(inputs[0].double()) * inputs[1].double(), *inputs[2:])
    assert ((found * found_scale).double() - exact).abs().max() < 0.75 * found_scale.max()


@pytest.mark.parametrize("n", [4096, 108 * 64, 172 * 32])
def test_a_row_in_tiles(n: int, tmp_path: Path) -> None:
    """One tile, two and three; rows one ahead; ends inside of a tile; scales of each row of a tile far apart."""
    block = lambda x, *c: hadamard(x, *c)
    others = [(torch.randn(rows, n).half(), *dense(n)) for rows in (1, 2)]
    launcher = check(block, torch.randn(5, n).half(), *dense(n), dynamic={0: (0,)}, run=others, folder=tmp_path)
    assert "arg0_ahead" in launcher.kernels[0].source and "ROWS=1" in launcher.source
    # one large channel among small ones, and rows of zeros
    spread = torch.randn(3, n).half() * torch.logspace(-6, 3, n)[torch.randperm(n)].half()
    spread[1] = 0
    check(block, spread, *dense(n), folder=tmp_path)
    # with what comes before and after; what is computed beyond the row's end must not reach the transform
    check(lambda x, s, *c: (hadamard(x.float().cos().half() * s, *c) + 1).sum(-1), torch.randn(3, n).half(),
          torch.tensor(random_signs(n, 0), dtype=torch.float16), *dense(n), folder=tmp_path, bound=2e-2)  # fmt: skip


def test_codes_of_a_row_in_tiles(tmp_path: Path) -> None:
    n = 172 * 32

    def rotated(gate, up, c):
        return quantize(hadamard(glu(gate, up, "silu"), c), 8, n)

    gate, up = torch.randn(3, n).half(), torch.randn(3, n).half()
    codes, scale = loaded(emitted(rotated, gate, up, *dense(n)), tmp_path)(gate, up, *dense(n))
    exact = hadamard(F.silu(gate.double()) * up.double(), *dense(n))
    assert ((codes * scale).double() - exact).abs().max() < 0.6 * scale.max()


@pytest.mark.parametrize(("n", "lead"), [(14336, (1, 1)), (8192, (2, 3)), (172 * 64, (3,)), (148 * 64, (1,))])
def test_few_rows_are_shared_by_programs(n: int, lead: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(*lead, n).half() * torch.logspace(-3, 2, n)[torch.randperm(n)].half()
    launcher = check(hadamard, x, *dense(n), folder=tmp_path, bound=1e-3)
    programs = int(launcher.source.partition("[(")[2].partition(",")[0])
    assert programs >= 8 * x[..., 0].numel()


def test_few_rows_with_a_core_of_real_numbers(tmp_path: Path) -> None:
    rotation = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q.contiguous()
    x = torch.randn(2, 40 * 256).half()
    for core_of in (rotation, rotation.float().t()):
        check(hadamard, x, core_of, folder=tmp_path, bound=1e-3)
    for row in (torch.zeros(1, 8192), torch.full((1, 8192), 700.0), torch.full((1, 8192), 1e-5)):
        check(lambda x: hadamard(x), row.half(), folder=tmp_path)
    # others than one whole block of 16 bits are taken by the row
    for given in (torch.randn(17, 8192).half(), torch.randn(1, 8192)):
        assert "while pid" in emitted(lambda x: hadamard(x), given).kernels[0].source
    assert "while pid" in emitted(lambda x: hadamard(x, None, 8192), torch.randn(1, 16384).half()).kernels[0].source


def test_what_the_kernel_does_not_take() -> None:
    assert "float64" in refused(hadamard, torch.randn(2, 64, dtype=torch.float64))
    assert "at most 32768" in refused(hadamard, torch.randn(1, 65536).half())
    assert "at most 8192 of float32" in refused(hadamard, torch.randn(2, 16384))
    assert "a core of 172 rows in float32" in refused(hadamard, torch.randn(2, 172), core(172))
    assert "at least 16" in refused(hadamard, torch.randn(2, 8))
