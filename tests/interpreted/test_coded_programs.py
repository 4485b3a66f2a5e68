"""Quantized models from capture to kernels, in Triton's interpreter, against the same program in eager."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline.compile import Compilation
from tests.codegen.regions import error

WEIGHTS = (
    "int2:g32", "int3:g64", "int4:g32", "int5:g16:asym", "int6", "int8", "ternary", "binary:g64", "fp8", "fp4:g32",
    "mxfp4", "mxfp8", "nvfp4",
)  # fmt: skip


class Block(torch.nn.Module):
    """RMSNorm, a gated unit, a residual: 128 → 192 → 128."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(128, eps=1e-5)
        self.gate, self.up = (torch.nn.Linear(128, 192, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(192, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def optimized(options: str, target: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return fuseline.optimize(Block().eval(), f"raise,quantize{{{options}}},fuse", target=target)


def check(options: str, rows: int = 5) -> Compilation:
    """Both targets agree; the compilation to kernels."""
    torch.compiler.reset()
    eager, kernels = (optimized(options, target) for target in ("eager", "triton"))
    x = torch.randn(rows, 128)
    with torch.no_grad():
        assert error(kernels(x), eager(x).double()) < 1e-5
    (compilation,) = fuseline.reports(kernels)
    return compilation


@pytest.mark.one_in(3)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights(weights: str) -> None:
    compilation = check(f"weights={weights}")
    assert not compilation.refusals
    assert any("decode_words" in op for kernel in compilation.kernels for op in kernel.ops)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "options",
    [
        "weights=int8,activations=int8", "weights=int4:g32:sym,activations=int8", "weights=int4,activations=int4",
        "weights=int3:g64,activations=int8", "weights=ternary,activations=int8", "weights=fp8,activations=fp8",
    ],
)  # fmt: skip
def test_codes_are_multiplied(options: str) -> None:
    """Both products read codes; the norm and the gated unit are followed by the kernels that make them."""
    compilation = check(options)
    assert not compilation.refusals
    assert sum("x_scale_ptr" in kernel.signature for kernel in compilation.kernels) >= 2


@pytest.mark.parametrize(
    "options",
    ["weights=fp4:g32,activations=int8", "weights=int8:asym,activations=int8", "weights=int8,activations=int8:g64"],
)
def test_other_activations_are_decoded_before_the_product(options: str) -> None:
    compilation = check(options)
    assert not any("x_scale_ptr" in kernel.signature for kernel in compilation.kernels)


def test_what_was_dropped_is_saved_from_its_words(tmp_path: Path) -> None:
    """Kernels hold words alone; an artifact has the codes as they are stored everywhere."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(3, 128)
    fuseline.optimize(model, "raise,quantize{weights=int3:g64},fuse", target="triton", keep_originals=False)
    with torch.no_grad():
        result = model(x)
        loaded = fuseline.load(fuseline.save(model, tmp_path / "out"), model=Block)
        assert error(loaded(x), result.double()) < 1e-5
