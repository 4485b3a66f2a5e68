"""rotate by random matrices on every family of the table, in float64 with the models' own casts promoted."""

from __future__ import annotations

import pytest
import torch

import fuseline
from fuseline import Pipeline
from fuseline.compiler import ops
from fuseline.compiler.precision import error, floats, run_promoted
from fuseline.compiler.program import Program
from fuseline.compiler.report import PassReport

pytest.importorskip("transformers")

from tests.families.promoted import captured, precision
from tests.families.registry import ROWS

#: Before norms of which the residual stream is read, whether its norms are RMSNorms or become such.
FOLDED = [
    "Llama", "Mistral", "Qwen 2", "Qwen 3", "Phi 3", "Granite", "Mixtral, grouped_mm", "Mixtral, batched_mm",
    "Qwen 3 MoE, grouped_mm", "Qwen 3 MoE, batched_mm", "GPT-2", "OPT",
]  # fmt: skip
#: Norms whose results are added to the stream.
BOUNDARY = ["Gemma 2", "OLMo 2", "BERT"]
QUICK = ["GPT-2"]


def rotated(before: Program) -> tuple[Program, PassReport, float]:
    pipeline = Pipeline("raise{allow_empty},rotate{r1,r2,r3,r4,kind=random-hadamard,seed=5,allow_empty}")
    with precision(torch.float64):
        after, report = pipeline.run(before, verification="full")
        pairs = zip(*(floats(p.run(before.examples)) for p in (after, before)), strict=True)
        return after, report["rotate"], max(error(a, b) for a, b in pairs)


def folds(report: PassReport, label: str) -> int:
    return report.rules.get(f"{label} into columns", 0)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in FOLDED])
def test_a_family_folds_throughout(name: str) -> None:
    after, report, off = rotated(captured(ROWS[name], torch.float64))
    assert off < 1e-12
    assert folds(report, "R1") and folds(report, "R2") == 2 and report.rules["R3 online"] == 2
    assert report.rules["R4 online"] >= 2
    tied = report.rules.get("R1 enters", 0)
    transforms = sum(node.target is ops.hadamard.overload for node in after.graph.nodes)
    assert transforms == 2 * 2 + report.rules["R4 online"] + 2 * tied and tied <= 1
    assert all("no product reads what this norm returns" in reason for reason in report.refused.values()), "q/k norms"


@pytest.mark.slow
@pytest.mark.parametrize("name", BOUNDARY)
def test_a_family_with_norms_behind_its_blocks(name: str) -> None:
    _, report, off = rotated(captured(ROWS[name], torch.float64))
    assert off < 1e-12
    assert not folds(report, "R1") and folds(report, "R2") == 2 and report.rules["R4 online"] == 2
    reasons = " ".join(report.refused.values())
    assert "would be left at run time" in reasons or "cannot be centred" in reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ROWS if n not in FOLDED and n not in BOUNDARY])
def test_any_model_is_exact_or_refused(name: str) -> None:
    try:
        before = captured(ROWS[name], torch.float64)
    except fuseline.UserError as reason:
        pytest.skip(f"not one graph: {reason.headline}")
    assert rotated(before)[2] < 1e-12


@pytest.mark.slow
def test_what_is_left_at_run_time_in_smollm2() -> None:
    from fuseline.cli.graphs import load_program

    before = load_program("demo:smollm2")
    for options, left in (("r1", 2), ("r1,untie", 0), ("r2", 0), ("r3", 60), ("r4", 30), ("r1,r2,r3,r4", 92)):
        after, report = Pipeline(f"raise,rotate{{{options}}}").run(before)
        assert sum(node.target is ops.hadamard.overload for node in after.graph.nodes) == left, options
        pairs = zip(floats(after.run(before.examples)), floats(run_promoted(before, before.examples)), strict=True)
        assert max(error(a, b) for a, b in pairs) < 1e-5
