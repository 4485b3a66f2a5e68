"""The linear template's kernels, in Triton's interpreter, against eager in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.config import RowConfig, TileConfig, Tiling
from fuseline.codegen.templates.linear import emit_linear
from fuseline.compiler.ops import dequantize, rms_norm
from tests.codegen import linear_runs
from tests.codegen.linear_cases import CASES, Case, Format, gated, quantized, residual, rms
from tests.codegen.regions import BOUNDS, error, loaded, region


def run(case: Case, folder: Path, rows: dict[torch.dtype, tuple[int, ...]], tiles: Tiling | None = None) -> None:
    for dtype, counts in rows.items():
        linear_runs.run(case, dtype, folder, counts, tiles)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_row(case: Case, tmp_path: Path) -> None:
    run(case, tmp_path, {torch.float32: (1,), torch.bfloat16: (1,)})


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_rows(case: Case, tmp_path: Path) -> None:
    """In float16: the interpreter multiplies the bits of bfloat16 tiles as integers. bfloat16 is in tests/gpu."""
    run(case, tmp_path, {torch.float32: (17,), torch.float16: (17,)})


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["int4 g32 zero", "qkv mixed formats", "everything"])
def test_few_and_very_many_rows(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    run(case, tmp_path, {torch.float32: (0, 3, 4, 5, 67)})


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "case",
    [
        Case("gate, up", 576, (1536, 1536), (Format(4, 64),), rms(accumulate=torch.float32), 1, epilogue=gated),
        Case("down", 1536, (576,), (Format(4, 96, True),), epilogue=residual, extras=lambda m: [(m, 576)]),
        Case("qkv", 576, (576, 192, 192), (Format(8),), rms(accumulate=torch.float32), 1),
    ],
    ids=str,
)
def test_sizes_of_a_real_layer(case: Case, tmp_path: Path) -> None:
    run(case, tmp_path, {torch.float32: (1, 17)}, Tiling(RowConfig(64, 512, 4), TileConfig(32, 256, 16)))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("elements", [32, 256, 1024])
@pytest.mark.parametrize("block_n", [1, 16])
def test_any_row_tile(elements: int, block_n: int, tmp_path: Path) -> None:
    tiles = Tiling(RowConfig(block_n, elements, 4, stages=2), TileConfig(16, 32, 32))
    for form in (Format(4, 96, True), Format(8, 36), Format()):
        case = Case("tile", 288, (17, 5), (form,), rms(), 1)
        run(case, tmp_path, {torch.float32: (1, 5)}, tiles)


def test_row_count_comes_from_all_leading_dimensions(tmp_path: Path) -> None:
    """[B, S, K] with both sizes symbolic, a transposed view as the input, and the input as its own residual."""
    codes, scale, _ = quantized(48, 48, 4, 16, False)

    def block(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> Any:
        h = rms_norm(x, None, 1e-6)
        return x + F.linear(h, dequantize(codes, scale, None, 4, 16, x.dtype))

    graph = region(block, (torch.randn(2, 3, 48), codes, scale), {0: (0, 1)})
    call = loaded(emit_linear(graph, "fused"), tmp_path)
    for shape in ((1, 1, 48), (2, 3, 48), (4, 5, 48)):
        x = torch.randn(shape)
        assert error(call(x, codes, scale), block(x.double(), codes, scale)) < 1e-6
    x = torch.randn(3, 2, 48).transpose(0, 1)
    assert error(call(x, codes, scale), block(x.double(), codes, scale)) < 1e-6


def test_casts_are_part_of_the_kernel(tmp_path: Path) -> None:
    """A float32 stream normalised and cast to float16 for the product, then cast back; a comparison as an output."""

    def block(x: torch.Tensor, w: torch.Tensor, weight: torch.Tensor) -> Any:
        y = F.linear(rms_norm(x, w, 1e-5).to(weight.dtype), weight).to(torch.float32)
        return y, y > 0.25

    inputs = (torch.randn(7, 64), torch.rand(64), torch.randn(24, 64, dtype=torch.float16) / 8)
    call = loaded(emit_linear(region(block, inputs, {0: (0,)}), "fused"), tmp_path)
    for m in (2, 7):
        y, mask = call(inputs[0][:m], *inputs[1:])
        exact, _ = block(*(t.double() for t in (inputs[0][:m], *inputs[1:])))
        assert y.dtype is torch.float32 and mask.dtype is torch.bool
        assert error(y, exact) < BOUNDS[torch.float16]
        assert torch.equal(mask, y > 0.25)


def test_poison_is_seen(tmp_path: Path) -> None:
    """The check of these tests fails for a kernel that leaves columns unwritten."""
    case = next(c for c in CASES if c.name == "float odd sizes")
    launcher = emit_linear(case.graph(5, torch.float32), "fused")
    assert isinstance(launcher, Launcher)
    one_less = re.sub(r"\(m \* (\d+),\)", lambda grid: f"(m * {int(grid[1]) - 1},)", launcher.source)
    shortened = Launcher(launcher.name, one_less, launcher.kernels)
    assert shortened.source != launcher.source
    inputs = case.inputs(1, torch.float32)
    assert not error(loaded(shortened, tmp_path)(*inputs), case.exact(inputs)[0]) < 1
