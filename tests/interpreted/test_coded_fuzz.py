"""Linears with coded weights under hypothesis: schemes, sizes that divide nothing, values at the ends of types."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.coded.config import CodedTiling, Tile
from fuseline.codegen.templates.linear import emit_linear
from tests.codegen.coded_cases import Coded
from tests.codegen.regions import BOUNDS, error, loaded

FORMATS = (*(f"int{b}" for b in range(2, 9)), "ternary", "binary", "fp8", "e5m2", "fp6", "fp4", "e1m4", "e4m0")
BLOCKS = ("mxfp8", "mxfp6", "mxfp4", "nvfp4")


@st.composite
def cases(draw: Any) -> Coded:
    if draw(st.integers(0, 4)) == 0:
        scheme, group = draw(st.sampled_from(BLOCKS)), 32
    else:
        form, group = draw(st.sampled_from(FORMATS)), draw(st.sampled_from([0, 16, 32, 48, 64, 128]))
        symmetry = draw(st.sampled_from([":sym", ":asym"])) if form.startswith("int") else ""
        scheme = f"{form}{f':g{group}' if group else ''}{symmetry}"
    channels = draw(st.integers(1, 300)) if not group else group * draw(st.integers(1, max(1, 384 // group)))
    widths = tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=3)))
    return Coded(scheme, channels, widths, draw(st.sampled_from(["", "", "rms", "layer"])))


def kernels(case: Coded, dtype: torch.dtype, folder: Any, tiles: CodedTiling | None = None) -> Any:
    launcher = emit_linear(case.graph(5, dtype), "fused", tiles)
    assert isinstance(launcher, Launcher), launcher
    return loaded(launcher, folder)


def check_scheme(
    tmp_path_factory: pytest.TempPathFactory, case: Coded, dtype: torch.dtype, rows: int, seed: int
) -> None:
    inputs = case.inputs(rows, dtype, seed)
    results = kernels(case, dtype, tmp_path_factory.mktemp("coded"))(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    for result, exact in zip(results, case.exact(inputs), strict=True):
        assert error(result, exact, 0.5) < BOUNDS[dtype]  # numbers are of about 1; a single one may be 0


schemes = given(cases(), st.sampled_from([torch.float16, torch.float32]), st.integers(1, 80), st.integers(0, 2**31))


@settings(max_examples=16, deadline=None)
@schemes
def test_any_scheme_and_size(
    tmp_path_factory: pytest.TempPathFactory, case: Coded, dtype: torch.dtype, rows: int, seed: int
) -> None:
    check_scheme(tmp_path_factory, case, dtype, rows, seed)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@schemes
def test_more_schemes_and_sizes(
    tmp_path_factory: pytest.TempPathFactory, case: Coded, dtype: torch.dtype, rows: int, seed: int
) -> None:
    check_scheme(tmp_path_factory, case, dtype, rows, seed)


def check_tile(
    tmp_path_factory: pytest.TempPathFactory, block_m: int, block_n: int, split: int, after: bool, rows: int
) -> None:
    tile = Tile(block_m, block_n, split, stages=2, scale_after=after)
    tiles = CodedTiling(tile, Tile(block_m, block_n, scale_after=not after), few_rows=20)
    for scheme in ("int4:g64", "int3:g16:sym"):
        case = Coded(scheme, 1024, (33, 7), "rms")
        inputs = case.inputs(rows, torch.float32)
        results = kernels(case, torch.float32, tmp_path_factory.mktemp("coded"), tiles)(*inputs)
        for result, exact in zip(results, case.exact(inputs), strict=True):
            assert error(result, exact) < BOUNDS[torch.float32]


any_tile = given(
    st.sampled_from([16, 32]), st.sampled_from([16, 32]), st.sampled_from([1, 2, 4]), st.booleans(), st.integers(1, 40)
)


@settings(max_examples=4, deadline=None)
@any_tile
def test_any_tile(
    tmp_path_factory: pytest.TempPathFactory, block_m: int, block_n: int, split: int, after: bool, rows: int
) -> None:
    check_tile(tmp_path_factory, block_m, block_n, split, after, rows)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@any_tile
def test_more_tiles(
    tmp_path_factory: pytest.TempPathFactory, block_m: int, block_n: int, split: int, after: bool, rows: int
) -> None:
    check_tile(tmp_path_factory, block_m, block_n, split, after, rows)


@pytest.mark.parametrize("scheme", ["int4:g32", "int8", "fp8", "mxfp4", "ternary"])
def test_what_is_not_finite_stays_in_its_row(scheme: str, tmp_path: Any) -> None:
    case = Coded(scheme, 96)
    inputs = case.inputs(6, torch.float32)
    inputs[0][0, 5], inputs[0][1, 7], inputs[0][2, 9] = float("inf"), float("-inf"), float("nan")
    inputs[0][3], inputs[0][4] = 1e-41, inputs[0][4] * 1e34
    result, (exact,) = kernels(case, torch.float32, tmp_path)(*inputs), case.exact(inputs)
    assert result[2].isnan().all() and torch.equal(result[:2].isnan(), exact[:2].isnan())
    assert torch.equal(result[:2].nan_to_num().sign(), exact[:2].float().nan_to_num().sign())
    for row, bound in ((3, 1e-3), (4, 1e-5), (5, 1e-5)):  # denormal numbers have few bits
        assert error(result[row], exact[row]) < bound


def test_a_scale_that_is_none_makes_its_column_none(tmp_path: Any) -> None:
    for scheme in ("int4:g32", "mxfp4", "nvfp4"):
        case = Coded(scheme, 96)
        inputs = case.inputs(3, torch.float32)
        scale = inputs[2]
        scale[1, 4] = 255 if scale.dtype == torch.uint8 else float("nan")
        result = kernels(case, torch.float32, tmp_path)(*inputs)
        assert result[:, 4].isnan().all() and result.isfinite().sum() == result.numel() - 3
