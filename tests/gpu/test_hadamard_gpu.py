"""Hadamard transforms on a GPU, against the op's formula in float64; codes, against the transform before rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fuseline.compiler.ops import glu, hadamard, quantize
from tests.codegen.hadamard_cases import MODELS, launcher, operands, transform
from tests.codegen.regions import BOUNDS, emitted, error, loaded

pytestmark = pytest.mark.gpu

SIZES = [16, 64, 128, 12, 96, 768, 172, 148, 47, 94, 3072, 5120, 13824, 28672, *MODELS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_sizes(n: int, dtype: torch.dtype, tmp_path: Path) -> None:
    call = loaded(launcher(n, dtype), tmp_path)
    core, signs = operands(n, dtype, "cuda")
    for rows in (1, 2, 3, 4, 16, 37, 1500):
        x = torch.randn(rows, n, device="cuda").to(dtype)
        exact = transform(n, signs)(x.double(), *core)
        result = call(x, *core)
        assert result.dtype == dtype and error(result, exact) < BOUNDS[dtype]
        # as good as the naive twin, which computes in float32 and rounds once
        plain = error(transform(n, signs)(x, *core), exact)
        assert error(result, exact) <= 1.5 * plain + 1e-4
        assert torch.equal(call(x, *core), result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [8192, 8960, 11008, 14336, 18944, 28672])
def test_few_rows(n: int, dtype: torch.dtype, tmp_path: Path) -> None:
    core, signs = operands(n, dtype, "cuda")
    for rows in (1, 2, 16):
        x = torch.randn(rows, n, device="cuda").to(dtype)
        call = loaded(emitted(transform(n, signs), x.cpu(), *(c.cpu() for c in core)), tmp_path)
        exact = transform(n, signs)(x.double(), *core)
        plain = error(transform(n, signs)(x, *core), exact)
        result = call(x, *core)
        assert result.dtype == dtype and error(result, exact) <= 1.5 * plain + 1e-4
        assert torch.equal(call(x, *core), result)


@pytest.mark.parametrize("n", [64, 576, 1536, 4096])
def test_float32_is_not_tf32(n: int, tmp_path: Path) -> None:
    call = loaded(launcher(n, torch.float32), tmp_path)
    core, signs = operands(n, torch.float32, "cuda")
    for rows in (1, 5, 300):
        x = torch.randn(rows, n, device="cuda")
        assert error(call(x, *core), transform(n, signs)(x.double(), *core)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("n", [96, 4096, 11008, 14336, 18944])
def test_gated_units_become_codes(n: int, tmp_path: Path) -> None:
    core, signs = operands(n, torch.bfloat16, "cuda")

    def rotated(gate, up, *core):
        return quantize(transform(n, signs)(glu(gate, up, "silu"), *core), 8, n)

    given = torch.randn(3, n).bfloat16(), torch.randn(3, n).bfloat16(), *(c.cpu() for c in core)
    call = loaded(emitted(rotated, *given, dynamic={0: (0,), 1: (0,)}), tmp_path)
    for rows in (1, 4, 700):
        gate, up = (torch.randn(rows, n, device="cuda").bfloat16() for _ in range(2))
        codes, scale = call(gate, up, *core)
        exact = transform(n, signs)(F.silu(gate.double()) * up.double(), *core)
        assert codes.dtype == torch.int8 and scale.shape == (rows, 1)
        assert (codes.double() * scale - exact).abs().max() < 0.75 * scale.max()


def test_strides(tmp_path: Path) -> None:
    heads = torch.randn(2, 5, 4, 128).bfloat16()
    call = loaded(emitted(lambda x: hadamard(x.transpose(1, 2)), heads), tmp_path)
    given = heads.cuda()
    assert error(call(given), hadamard(given.double().transpose(1, 2))) < BOUNDS[torch.bfloat16]
