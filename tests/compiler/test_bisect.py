"""The search: the guilty rewrite in few runs, whatever the fault does; and rewrites counted over a process."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pipeline, UserError
from fuseline.compiler.debug.bisect import Bisection, Outcome
from fuseline.compiler.observe import Limit
from fuseline.compiler.observe.limit import Entry, read_journal
from tests.helpers.models import Mlp

STEPS = (("raise", 181), ("quantize", 210), ("fuse", 213))


def journal(count: int | None = None, steps: tuple = STEPS) -> list[Entry]:
    found: list[Entry] = []
    for step, (name, rewrites) in enumerate(steps):
        for _ in range(rewrites):
            n = len(found) + 1
            found.append(Entry(n, 0, step, name, "rule", f"site#{n}", f"{name}.py:{n}"))
    return found[:count]


def script(guilty: int, rate: float = 1.0, seed: int = 0, steps: tuple = STEPS):
    """A command that fails where the rewrite `guilty` happens, at this rate."""
    draw = random.Random(seed)

    def run(limit: int | None, skip: frozenset[int]) -> Outcome:
        happens = guilty not in skip and (limit is None or limit >= guilty)
        return Outcome(happens and draw.random() < rate, {"rank0": journal(limit, steps)}, "exit code 1")

    return run


@pytest.mark.parametrize("guilty", [1, 2, 180, 181, 182, 300, 391, 392, 500, 603, 604])
def test_it_takes_few_runs(guilty: int) -> None:
    found = Bisection(script(guilty)).search()
    assert (found.kind, found.number, found.confidence, found.also) == ("rewrite", guilty, 1.0, False)
    assert found.entry.location == f"{found.entry.pass_name}.py:{guilty}"
    assert found.runs <= math.log2(found.rewrites) + 6


def test_every_place_of_many_schedules_within_the_bound() -> None:
    for steps in [(("a", 1),), (("a", 1), ("b", 1)), (("a", 500), ("b", 3)), tuple((f"p{i}", 7) for i in range(40))]:
        total = sum(n for _, n in steps)
        for guilty in range(1, total + 1, max(1, total // 40)):
            found = Bisection(script(guilty, steps=steps)).search()
            assert found.number == guilty and found.runs <= math.log2(total) + 6


def test_a_pass_is_found_before_its_rewrite() -> None:
    limits: list[int | None] = []
    run = script(300)
    Bisection(lambda limit, skip: (limits.append(limit), run(limit, skip))[1]).search()
    assert limits[:4] == [None, 0, 391, 181]  # all, none, then the ends of passes


def test_a_second_fault_is_mentioned() -> None:
    def run(limit: int | None, skip: frozenset[int]) -> Outcome:
        wrong = any(n not in skip and (limit is None or limit >= n) for n in (100, 400))
        return Outcome(wrong, {"rank0": journal(limit)})

    found = Bisection(run).search()
    assert found.number == 100 and found.also


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.9])
def test_a_flaky_fault_is_found_with_the_confidence_it_says(rate: float) -> None:
    right = 0
    for seed in range(12):
        found = Bisection(script(250, rate, seed), flaky=True, most=400).search()
        if found.kind == "nothing":
            continue
        assert found.confidence >= 0.95 and found.confidence < 1.0
        right += found.number == 250
    assert right >= 10


def test_flakiness_is_noticed_without_being_told() -> None:
    outcomes = [Bisection(script(250, 0.7, seed), most=400).search() for seed in range(12)]
    wrong = [o for o in outcomes if o.kind == "rewrite" and o.number != 250 and not o.also]
    assert sum(o.number == 250 for o in outcomes) >= 7 and len(wrong) <= 2


def test_a_pass_without_end_is_named() -> None:
    steps = (("raise", 50), ("loop", 5000))

    def run(limit: int | None, skip: frozenset[int]) -> Outcome:
        return Outcome(limit is None, {"process1": journal(limit, steps)}, "300 s", endless=limit is None)

    found = Bisection(run).search()
    assert (found.kind, found.number, found.entry.pass_name) == ("endless", 51, "loop") and found.runs == 3
    assert "5000 rewrites by loop/rule, and no end" in found.detail


def test_a_rule_without_end_is_told_from_the_time_it_takes() -> None:
    """What a run came to in its time may take longer the next time: the search does not depend on it."""
    repeated = [Entry(n, 0, 1, "loop", "rule", "site#51", "loop.py:9") for n in range(51, 5051)]

    def run(limit: int | None, skip: frozenset[int]) -> Outcome:
        hangs = limit is None or limit > 2000
        return Outcome(hangs, {"here": [*journal(None, (("raise", 50),)), *repeated][:limit]}, "60 s", endless=hangs)

    found = Bisection(run).search()
    assert (found.kind, found.number, found.runs, found.confidence) == ("endless", 51, 3, 1.0)


def test_a_rewrite_that_hangs_is_no_rule_without_end() -> None:
    steps = (("raise", 500),)

    def run(limit: int | None, skip: frozenset[int]) -> Outcome:
        hangs = 500 not in skip and (limit is None or limit >= 500)
        return Outcome(hangs, {"here": journal(limit, steps)}, "60 s", endless=hangs)

    found = Bisection(run).search()
    assert (found.kind, found.number, found.confidence) == ("rewrite", 500, 1.0)


def test_ends_that_say_nothing() -> None:
    assert Bisection(lambda limit, skip: Outcome(False, {"p": journal(limit)})).search().kind == "nothing"
    assert Bisection(lambda limit, skip: Outcome(True, {"p": journal(limit)})).search().kind == "elsewhere"
    with pytest.raises(UserError, match="no rewrite of Fuseline's happened in it"):
        Bisection(lambda limit, skip: Outcome(limit is None, {})).search()
    with pytest.raises(UserError, match="cannot tell"):
        Bisection(lambda limit, skip: Outcome(None, {})).search()
    with pytest.raises(UserError, match="not found in 4 runs\n  try: --runs 8"):
        Bisection(script(300), most=4).search()


def test_runs_that_cannot_tell_are_gone_around() -> None:
    run = script(300)

    def gap(limit: int | None, skip: frozenset[int]) -> Outcome:
        outcome = run(limit, skip)
        return Outcome(None, outcome.entries) if limit in (391, 181, 286) else outcome

    assert Bisection(gap).search().number == 300


def mlp() -> fuseline.Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp(), (torch.randn(4, 8),))


def test_the_first_rewrites_are_the_same_under_every_limit() -> None:
    everything = Limit()
    Pipeline("quantize{weights=int8},fuse").run(mlp(), [everything])
    total = len(everything.entries)
    assert total > 4 and [e.number for e in everything.entries] == list(range(1, total + 1))
    for limit in range(total + 1):
        some = Limit(limit)
        Pipeline("quantize{weights=int8},fuse").run(mlp(), [some])
        assert [str(e) for e in some.entries] == [str(e) for e in everything.entries[:limit]]
    first = everything.entries[0]
    assert (
        first.location.endswith(".py:" + first.location.rpartition(":")[2])
        and Path(first.location.rpartition(":")[0]).is_file()
    )
    assert any("linear" in text for text in first.before) and any("dequantize" in text for text in first.after)
    assert first.line and "models.py" in first.line


def test_one_rewrite_can_be_left_out() -> None:
    skipping = Limit(skip=[2])
    _, report = Pipeline("quantize{weights=int8}").run(mlp(), [skipping])
    assert [e.number for e in skipping.entries] == [1, 3] and report["quantize"].matched == 2


SCRIPT = """
import torch
torch.manual_seed(0)
def model(x, w):
    return torch.relu(x @ w) * torch.sigmoid(x @ w) + 1
for size in (4, 6):
    torch.compile(model, backend="fuseline", dynamic=False)(torch.randn(size, 8), torch.randn(8, 8))
"""


@pytest.mark.slow
def test_the_environment_limits_a_script_that_knows_nothing_of_it(tmp_path: Path) -> None:
    def run(**variables: str) -> list[Entry]:
        folder = tmp_path / f"journal{len(list(tmp_path.iterdir()))}"
        root = str(Path(fuseline.__file__).parents[1])
        settings = {"PYTHONPATH": root, "FUSELINE_JOURNAL": str(folder), **variables}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], env={**os.environ, **settings}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        (entries,) = read_journal(folder).values()
        return entries

    full = run()
    assert {e.program for e in full} == {0, 1}, "the count runs on over both graphs"
    assert [e.number for e in run(FUSELINE_LIMIT=str(len(full) - 1))] == [e.number for e in full[:-1]]
    assert run(FUSELINE_SKIP="1")[0].number == 2


def test_a_torn_journal_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    entry = {"number": 1, "program": 0, "step": 0, "pass_name": "p", "rule": "r", "site": "s", "location": None}
    (tmp_path / "rank0.jsonl").write_text(json.dumps(entry) + '\n{"number": 2, "prog')
    assert [e.number for e in read_journal(tmp_path)["rank0"]] == [1]


def test_a_limit_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELINE_LIMIT", "all")
    with pytest.raises(UserError, match="FUSELINE_LIMIT holds numbers of rewrites, not 'all'\n  try: unset"):
        Pipeline("fuse").run(mlp())
