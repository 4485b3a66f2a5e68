"""The hunt: each planted fault is named by its rule's file and line, made small, and fails again by itself.

The whole corpus hides among the 660 rewrites of SmolLM2's 1,950 nodes (slow); a few of it in a tiny model run always.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from pathlib import Path

import pytest
import torch

from fuseline import Pipeline, Program
from fuseline.compiler.debug.bisect import Bisection, Culprit
from fuseline.compiler.debug.check import Check
from fuseline.compiler.debug.in_process import InProcess
from fuseline.compiler.debug.reduce import reduce
from fuseline.compiler.debug.rerun import rerun
from fuseline.compiler.debug.settle import settle
from tests.debugging.faults import FAULTS
from tests.debugging.models import noting

pytest.importorskip("transformers")

TINY = ["dropped-residual", "wrong-scale-axis", "stale-metadata", "lost-alias", "wrong-at-one-shape", "crash"]
FLAKY = "nondeterministic"
NODES = 10


@cache
def subject(model: str) -> Program:
    torch.manual_seed(0)
    return noting(model)


def pipeline(fault: str, layer: int) -> Pipeline:
    return Pipeline(f"planted{{fault={fault},layer={layer}}}")


def search(model: str, fault: str, layer: int, seconds: float) -> Culprit:
    check = Check.parse(f"any|hang:{seconds}")
    run = InProcess(subject(model), pipeline(fault, layer), check)
    return Bisection(run, flaky=fault == FLAKY).search()


def named_rightly(found: Culprit, fault: str) -> bool:
    rule = FAULTS[fault]
    place = f"{inspect.getsourcefile(rule)}:{inspect.getsourcelines(rule)[1]}"
    return found.entry is not None and (found.entry.rule, found.entry.location) == (fault, place)


def hunted(model: str, fault: str, layer: int, seconds: float, folder: Path) -> tuple[Culprit, int]:
    """The culprit, and the nodes of its reproducer, which has failed in a fresh process."""
    found = search(model, fault, layer, seconds)
    assert named_rightly(found, fault), found
    check = Check.parse(f"any|hang:{seconds}")
    repeat = 12 if fault == FLAKY else 1
    reduced = reduce(subject(model), pipeline(fault, layer), check, repeat=repeat)
    path = folder / f"{fault}.py"
    recipe = settle(path, reduced.after, reduced.check, reduced.verdict, "reduced", repeat=repeat)
    assert recipe is not None, f"{fault}: what was reduced does not fail once it is read back"
    again = rerun(path)
    assert again.reproduced, f"{fault}: {again}"
    return found, reduced.after.nodes


def test_the_corpus_is_whole() -> None:
    assert len(FAULTS) >= 12 and set(TINY) <= set(FAULTS)
    places = {inspect.getsourcelines(rule)[1] for rule in FAULTS.values()}
    assert len(places) == len(FAULTS), "each has a line of its own"


@pytest.mark.one_in(6)
@pytest.mark.parametrize("fault", TINY)
def test_a_fault_in_a_tiny_model(fault: str, tmp_path: Path) -> None:
    found = search("demo:tiny-llama", fault, 1, 60)
    assert named_rightly(found, fault)
    assert (found.kind, found.confidence, found.also) == ("rewrite", 1.0, False)
    assert found.runs <= math.log2(found.rewrites) + 6


def test_a_tiny_model_without_a_fault_is_not_accused() -> None:
    found = Bisection(InProcess(subject("demo:tiny-llama"), Pipeline("planted"), Check.parse("any"))).search()
    assert found.kind == "nothing" and found.runs == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dropped-residual", "stale-metadata"])
def test_a_small_reproducer_of_a_tiny_model(fault: str, tmp_path: Path) -> None:
    _, nodes = hunted("demo:tiny-llama", fault, 1, 60, tmp_path)
    assert nodes <= NODES


@pytest.mark.slow
def test_hundreds_of_rewrites_hide_it() -> None:
    _, report = Pipeline("planted").run(subject("demo:smollm2"), verification="off")
    assert report.rewrites >= 500 and len(subject("demo:smollm2")) > 1900
    assert not Check.parse("any")(subject("demo:smollm2"), Pipeline("planted"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_the_whole_corpus_in_smollm2(fault: str, tmp_path: Path, record_property) -> None:
    seconds = 60 if fault in ("stuck", "endless") else 600
    found, nodes = hunted("demo:smollm2", fault, 17, seconds, tmp_path)
    for name, value in (("runs", found.runs), ("rewrites", found.rewrites), ("nodes", nodes)):
        record_property(name, value)
    assert nodes <= NODES
    if fault == FLAKY:
        assert 0.95 <= found.confidence < 1 and found.failing_rate < 0.95
    else:
        assert found.confidence == 1.0 and not found.also
        assert found.runs <= math.log2(found.rewrites) + 6
