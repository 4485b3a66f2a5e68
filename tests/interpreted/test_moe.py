"""The kernels of routed experts, in Triton's interpreter, against the op's naive twin in float64."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from fuseline.codegen.kernel import Launcher
from fuseline.codegen.templates.experts.config import RowConfig, Stage, TileConfig, Tiling
from fuseline.codegen.templates.moe import emit_moe
from tests.codegen.moe_cases import CASES, CODED, LOW_RANK, PAIR_CODED, PAIRS, Case, Layer
from tests.codegen.regions import BOUNDS, error, loaded

BY_NAME = {case.name: case for case in CASES + PAIRS + CODED + PAIR_CODED + LOW_RANK}
SMALL = Tiling(
    Stage(RowConfig(2, 16), RowConfig(4, 8)),
    Stage(TileConfig(64, 16, 32), TileConfig(64, 32, 16, group_m=2)),
    Stage(TileConfig(128, 32, 16), TileConfig(128, 16, 32)),
    means=(2, 3, 4),
)
"""Small tiles, and few tokens until the largest serve: 4, 6 and 8 with two of four experts each."""


CODES = Tiling(
    SMALL.one,
    Stage(TileConfig(64, 16, 32), TileConfig(64, 32, 16)),
    Stage(TileConfig(128, 32, 16), TileConfig(128, 16, 32)),
    means=(1, 1, 1),
)


def run(
    case: Case,
    dtype: torch.dtype,
    folder: Path,
    counts: Iterable[int],
    tiles: Tiling | None = None,
    indices: torch.Tensor | None = None,
) -> None:
    call = loaded(launcher_of(case, dtype, tiles), folder)
    for m in counts:
        seed = torch.seed() % 2**31
        inputs = case.inputs(m, dtype, seed, indices=indices)
        result, again, exact = call(*inputs), call(*inputs), case.exact(inputs)
        assert (result.shape, result.dtype) == (exact.shape, dtype)
        assert error(result, exact) < BOUNDS[dtype], (m, seed)
        assert torch.equal(result, again)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_token_some_and_none(case: Case, tmp_path: Path) -> None:
    run(case, torch.float32, tmp_path, (1, 5, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["odd sizes", "clamped"])
def test_16_bits(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    run(BY_NAME[name], dtype, tmp_path, (1, 4))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_pairs(case: Case, tmp_path: Path) -> None:
    run(case, torch.bfloat16, tmp_path, (1, 5))


FEW_BITS = [
    ("pairs in int4:channel", torch.bfloat16, (1, 3)), ("pairs in fp8:channel", torch.float32, (5,)),
    ("pairs in int4:g64", torch.float16, (1, 3, 5)), ("pairs in fp8:g64", torch.bfloat16, (1, 3, 5)),
    ("pairs in fp8:g128", torch.float16, (1, 3, 5)),
]  # fmt: skip
RANKS = [
    ("int3:g64 with ranks", torch.bfloat16, (2,)), ("int3:g64 with ranks", torch.float32, (1, 5)),
    ("int3:g64 with 16", torch.bfloat16, (1, 2, 5)), ("int4 with int8", torch.float16, (1, 2, 5)),
]  # fmt: skip


@pytest.mark.one_in(6)
@pytest.mark.parametrize("case", CODED, ids=str)
def test_codes(case: Case, tmp_path: Path) -> None:
    """Sums are scaled where there are few tokens, values where there are many."""
    run(case, torch.bfloat16 if case.name in ("int4:g32", "mxfp4") else torch.float32, tmp_path, (1, 5), CODES)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(("name", "dtype", "counts"), FEW_BITS)
def test_pairs_of_few_bits(name: str, dtype: torch.dtype, counts: tuple[int, ...], tmp_path: Path) -> None:
    """One token; few, where a tile has both experts of a pair; many, where it has one of them."""
    run(BY_NAME[name], dtype, tmp_path, counts, SMALL)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("name", "dtype", "counts"), RANKS)
def test_low_ranks_beside_codes(name: str, dtype: torch.dtype, counts: tuple[int, ...], tmp_path: Path) -> None:
    """Ranks that differ, none among them, as numbers and as codes."""
    run(BY_NAME[name], dtype, tmp_path, counts, CODES)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "name, counts",
    [("plain", (3, 5, 7, 14)), ("odd sizes", (8,)), ("pairs", (1, 2, 3, 4)), ("pairs and alone", (7,))],
)
def test_every_size_of_tiles(name: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """Tiles of 16, 32, 64 and 128 tokens, each where the number of tokens asks for it."""
    dtype = torch.float32 if BY_NAME[name].pairs is None else torch.bfloat16
    run(BY_NAME[name], dtype, tmp_path, counts, SMALL)


@pytest.mark.parametrize("name", ["plain", "pairs"])
def test_all_tokens_on_one_expert(name: str, tmp_path: Path) -> None:
    """More tokens than a tile, of one expert, twice for each token; the other experts have none."""
    dtype = torch.float32 if BY_NAME[name].pairs is None else torch.bfloat16
    run(BY_NAME[name], dtype, tmp_path, (12,), indices=torch.full((12, 2), 3))


def launcher_of(case: Case, dtype: torch.dtype, tiles: Tiling | None = None) -> Launcher:
    launcher = emit_moe(case.graph(dtype), "fused", tiles)
    assert isinstance(launcher, Launcher), launcher
    return launcher


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sizes(data: st.DataObject, tmp_path: Path) -> None:
    """Sizes that divide nothing; experts of any number, with and without tokens, occurring twice in a row or not."""
    draw = lambda low, high: data.draw(st.integers(low, high))
    experts, pairs = draw(1, 7), data.draw(st.booleans())
    even = 2 if pairs else 1
    case = Case(
        "drawn",
        width=draw(1, 40 // even) * even,
        inner=draw(1, 40 // even) * even,
        experts=experts,
        top=draw(1, 4),
        pairs=draw(0, experts // 2) if pairs else None,
        interleaved=data.draw(st.booleans()),
        bias=data.draw(st.booleans()),
    )
    m = draw(1, 9)
    indices = torch.tensor([[draw(0, experts - 1) for _ in range(case.top)] for _ in range(m)])
    dtype = torch.bfloat16 if pairs else torch.float32
    run(case, dtype, tmp_path, (m,), data.draw(st.sampled_from([None, SMALL])), indices)


def test_poison_is_seen(tmp_path: Path) -> None:
    """The check of these tests fails for a first product that leaves tiles unwritten."""
    case = BY_NAME["plain"]
    launcher = launcher_of(case, torch.float32)
    one_less = re.sub(r"fused_up_few\[\(tiles \* (\d+),", r"fused_up_few[((tiles - 1) * \1,", launcher.source)
    assert one_less != launcher.source
    inputs = case.inputs(6, torch.float32, 0)
    assert not error(loaded(replace(launcher, source=one_less), tmp_path)(*inputs), case.exact(inputs)) < 1


def test_another_layout_runs_through_the_op(tmp_path: Path) -> None:
    """A kernel is written for the strides that the graph has; others are no error."""
    case = BY_NAME["plain"]
    call = loaded(launcher_of(case, torch.float32), tmp_path)
    inputs = case.inputs(4, torch.float32, 0)
    inputs[3] = inputs[3].transpose(1, 2).contiguous().transpose(1, 2)
    assert error(call(*inputs), case.exact(inputs)) < BOUNDS[torch.float32]


PIPELINES = {
    "fuse": (torch.float32, 1e-5),
    "quantize{weights=int4:g16,skip=router},fuse": (torch.float32, 1e-5),
    "raise{allow_empty},merge-experts{method=puzzle,ratio=0.5,saliency=magnitude},fuse": (torch.bfloat16, 2e-2),
    "raise{allow_empty},merge-experts{saliency=magnitude,pack=int4},fuse": (torch.float32, 1e-5),
    "raise{allow_empty},merge-experts{method=milo,weights=int3:g16,rank=2,rounds=2},fuse": (torch.float32, 1e-5),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_compiled_layer(pipeline: str) -> None:
    """Through torch.compile, with a router whose choice the kernels are given: as in eager."""
    dtype, bound = PIPELINES[pipeline]
    torch.manual_seed(0)  # a choice that rounding could turn is none of the kernels'
    layer, x = Layer(Case("layer", 32, 16, 4, 2)).to(dtype).eval(), torch.randn(6, 32).to(dtype)
    results = []
    for target in ("triton", "eager"):
        torch.compiler.reset()
        compiled = torch.compile(layer, backend="fuseline", options={"target": target, "pipeline": pipeline})
        with torch.no_grad():
            results.append(compiled(x))
    assert error(*results) < bound
