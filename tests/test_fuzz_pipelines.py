"""Random graphs through random pipelines: what every pipeline of exact passes keeps, whatever the graph.

The graphs hold what the passes look for in several spellings, among look-alikes (`tests/blocks.py`); the pipelines are
drawn from the registry (`tests/strategies.py`), so a new exact pass is fuzzed from its first day. In float64, where a
rewrite of an exact pass may change roundings and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

import fuseline
from fuseline import Pipeline, Program
from fuseline.codegen.lower import lower
from fuseline.compiler.action import Observer
from fuseline.compiler.observe import Limit
from fuseline.compiler.order import Partition
from fuseline.compiler.pipeline import DEFAULT
from fuseline.compiler.stage import Recipe, load_stage, render
from fuseline.compiler.structure import same_structure
from fuseline.passes.raising import RMSNorm
from fuseline.passes.raising.masks import Claim, Masks
from tests.blocks import WIDTH, Blocks, blocks
from tests.strategies import exact_passes, pipelines

EXACT, AFTER_QUANTIZE = 1e-12, 1e-9
LENGTH = 6


def inputs(length: int = LENGTH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    x, cache = (torch.randn(length, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return [x, cache, torch.tensor([length - 2])]


def captured(network: Blocks, symbolic: bool) -> Program:
    tokens = {0: torch.export.Dim.AUTO}
    return fuseline.capture(network, tuple(inputs()), dynamic=(tokens, tokens, {}) if symbolic else None)


def results(run: Any, length: int = LENGTH) -> list[torch.Tensor]:
    """What `run(x, cache, row)` returns, and the cache as it is then."""
    given = inputs(length)
    with torch.no_grad():
        return [*run(*given), given[1]]


def through(program: Program) -> Any:
    """The program as a function of the inputs."""
    state = {source.index: source.tensor for source in program.sources.values()}
    positions = program.arguments

    def run(*given: torch.Tensor) -> Any:
        flat = {**state, **dict(zip(positions, given, strict=True))}
        return program.run([flat[i] for i in range(len(flat))])

    return run


def error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest max|Δ| / max(max|reference|, 1); a value that cancels to zero is measured against one."""
    assert [a.shape for a in actual] == [e.shape for e in expected]
    gaps = [(a - e).abs().max() / e.abs().max().clamp_min(1.0) for a, e in zip(actual, expected, strict=True)]
    return max(gap.nan_to_num(nan=float("inf")).item() for gap in gaps)


class Stages(Observer):
    """Keeps a copy of the program after each pass."""

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def pass_ends(self, step: Any, program: Program, report: Any) -> None:
        self.programs.append(program.copy())


def reread(program: Program, folder: Path) -> tuple[str, Program]:
    path = folder / "stage.py"
    path.write_text(render(program, "a stage", Recipe("none"), path.name))
    return path.read_text(), load_stage(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


def check_exact(network: Blocks, pipeline: Pipeline, symbolic: bool) -> None:
    program = captured(network, symbolic)
    after, _ = pipeline.run(program, verification="full")
    for length in (LENGTH, LENGTH + 3) if symbolic else (LENGTH,):
        assert error(results(through(after), length), results(network, length)) <= EXACT
    assert after.mutated == program.mutated


def check_quantized(network: Blocks, pipeline: Pipeline, symbolic: bool) -> None:
    """The passes before and behind `quantize` are exact, so what it rounds is all that the pipeline changes."""
    program = captured(network, symbolic)
    names = [step.name for step in pipeline.passes]
    rounded, _ = Pipeline(pipeline.passes[: names.index("quantize") + 1]).run(program)
    after, _ = pipeline.run(program, verification="full")
    for length in (LENGTH, LENGTH + 3) if symbolic else (LENGTH,):
        assert error(results(through(after), length), results(through(rounded), length)) <= AFTER_QUANTIZE


def check_prefix(network: Blocks, pipeline: Pipeline, share: float) -> None:
    """What a search by halves rests on: with its first rewrites alone a pipeline is exact too."""
    program, whole = captured(network, False), Limit()
    pipeline.run(program, [whole])
    count = round(share * whole.count)
    limit = Limit(count)
    after, _ = pipeline.run(program, [limit], verification="full")
    assert limit.count == len(limit.entries) == count
    assert error(results(through(after)), results(network)) <= EXACT


def check_stages(network: Blocks, pipeline: Pipeline, symbolic: bool, folder: Path) -> None:
    """Every stage reads back as it was written, and computes the same."""
    stages = Stages()
    pipeline.run(captured(network, symbolic), [stages])
    for program in stages.programs:
        text, again = reread(program, folder)
        second, twice = reread(again, folder)
        assert second == text and same_structure(twice, again)
        assert symbolic or same_structure(again, program)
        for length in (LENGTH, LENGTH + 3) if symbolic else (LENGTH,):
            expected = results(through(program), length)
            again.sources = program.sources  # a stage of types alone has no values
            assert all(map(torch.equal, results(through(again), length), expected))


def check_lowered(network: Blocks, pipeline: Pipeline) -> None:
    """The same program gives the same text, from another capture too."""
    texts = set()
    for _ in range(2):
        after, _ = pipeline.run(captured(network, True))
        texts |= {lower(after).source, lower(after.copy()).source}
    assert len(texts) == 1


def fuzzed(examples: int) -> Any:
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck))


def test_the_passes_that_are_drawn() -> None:
    assert {"raise", "fuse"} <= {kind.name for kind in exact_passes()}


@given(st.booleans().flatmap(pipelines))
def test_a_pipeline_reads_as_it_is_written(pipeline: Pipeline) -> None:
    assert Pipeline(str(pipeline)) == pipeline and str(Pipeline(str(pipeline))) == str(pipeline)


@fuzzed(10)
@given(blocks(), pipelines(), st.booleans())
def test_exact_pipelines_keep_results(network: Blocks, pipeline: Pipeline, symbolic: bool) -> None:
    check_exact(network, pipeline, symbolic)


@pytest.mark.slow
@fuzzed(15)
@given(blocks(), pipelines(quantize=True), st.booleans())
def test_a_lossy_pass_is_all_that_rounds(network: Blocks, pipeline: Pipeline, symbolic: bool) -> None:
    check_quantized(network, pipeline, symbolic)


@fuzzed(8)
@given(blocks(), pipelines(), st.floats(0, 1))
def test_the_first_rewrites_alone_keep_results(network: Blocks, pipeline: Pipeline, share: float) -> None:
    check_prefix(network, pipeline, share)


@pytest.mark.slow
@fuzzed(10)
@given(blocks(5), st.booleans().flatmap(pipelines), st.booleans())
def test_stages_read_back(folder: Path, network: Blocks, pipeline: Pipeline, symbolic: bool) -> None:
    check_stages(network, pipeline, symbolic, folder)


@pytest.mark.slow
@fuzzed(6)
@given(blocks(5), st.booleans().flatmap(pipelines))
def test_lowering_is_deterministic(network: Blocks, pipeline: Pipeline) -> None:
    check_lowered(network, pipeline)


UNWRITTEN = [
    (sys.modules[f"fuseline.{module}"], name, lambda node: False)
    for module in ("compiler.order", "passes.fusing.clusters", "passes.fusing.linear")
    for name in ("touches_written", "is_barrier")
    if hasattr(sys.modules[f"fuseline.{module}"], name)
]
FAULTS: dict[str, list[tuple[Any, str, Any]]] = {
    "a norm over any dimension": [(RMSNorm, "refuse", lambda self, match: None)],
    "any mask is causal": [(Masks, "claim", lambda self, mask, q, k: Claim("causal"))],
    "a cache is a tensor like others": UNWRITTEN,
    "any set of nodes can run as one": [(Partition, "fits", lambda self, nodes, name=None: True)],
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_the_fuzzer_finds(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these guards is there for a reason that the random graphs know."""
    for change in FAULTS[fault]:
        monkeypatch.setattr(*change)

    @settings(fuzzed(60), phases=[Phase.generate])
    @given(blocks())
    def fuzz(network: Blocks) -> None:
        check_exact(network, Pipeline(DEFAULT), False)

    with pytest.raises((AssertionError, fuseline.FuselineError)):
        fuzz()


@pytest.mark.slow
@fuzzed(60)
@given(blocks(10), st.booleans(), st.booleans(), st.floats(0, 1), st.data())
def test_many_more(
    folder: Path, network: Blocks, quantize: bool, symbolic: bool, share: float, data: st.DataObject
) -> None:
    pipeline = data.draw(pipelines(quantize))
    if quantize:
        check_quantized(network, pipeline, symbolic)
    else:
        check_exact(network, pipeline, symbolic)
        check_prefix(network, pipeline, share)
    check_stages(network, pipeline, symbolic, folder)
    check_lowered(network, pipeline)
