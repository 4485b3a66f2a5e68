"""How rsparse's search chooses: the margin, the calls that it is held to, slopes against differences, the front."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import fuseline
from fuseline import Pipeline
from fuseline.compiler.framework import Study
from fuseline.passes.rotation.learning.losses import Loss, criterion
from fuseline.passes.sparsity import RSparse
from fuseline.passes.sparsity.budgets import Budgets, Choice, sensitivity, split
from fuseline.passes.sparsity.curves import FRACTIONS, Curve
from fuseline.passes.sparsity.decide import Decision
from fuseline.passes.sparsity.descent import FURTHEST, reweighted
from fuseline.passes.sparsity.front import searched
from fuseline.passes.sparsity.options import LowRankUse
from fuseline.passes.sparsity.selection import LEVEL, gain, parted, quantile
from fuseline.passes.sparsity.slopes import Slopes, ends
from fuseline.passes.sparsity.trial import Judge
from tests.helpers.models import tiny_llama


def study(count: int = 8) -> Study:
    model, draw = tiny_llama(), torch.Generator().manual_seed(0)
    calls = [{"input_ids": torch.randint(0, 100, (1, 48), generator=draw), "use_cache": False} for _ in range(count)]
    with torch.no_grad():
        captured = fuseline.capture(model, (), calls[0])
        program, _ = Pipeline("raise").run(captured)
    module = captured.to_module()
    return Study(program, [module.arguments(**call) for call in calls])


def test_calls_are_spread_and_none_is_on_both_sides() -> None:
    assert parted(range(12), 4) == ([0, 3, 6, 9], [1, 2, 4, 5, 7, 8, 10, 11])
    assert parted(range(3), 5) == ([0, 1, 2], [])
    for count in range(1, 12):
        one, other = parted(range(11), count)
        assert len(one) == min(count, 11) and sorted(one + other) == list(range(11))


@pytest.mark.parametrize("share", [0.9, 0.95, 0.95 + 0.05 * 2 / 3, 0.99])
@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 7, 30])
def test_students_quantile(share: float, freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    assert quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=0.03 if freedom == 3 else 0.01)


def test_luck_is_not_taken_for_a_gain_and_a_gain_is_seen() -> None:
    """Of candidates that are no better one in twenty may be taken at the most; one that is 5% better is."""
    draw, rounds = random.Random(0), 2000
    hardness = lambda: [draw.lognormvariate(0, 0.5) for _ in range(8)]
    noisy = lambda base, factor: [b * factor * draw.lognormvariate(0, 0.03) for b in base]
    taken = better = 0
    for _ in range(rounds):
        base = hardness()
        taken += any(gain(noisy(base, 1.0), base, 3).is_one for _ in range(3))
        better += gain(noisy(base, 0.95), base, 3).is_one
    assert taken / rounds < LEVEL + 0.02
    assert better / rounds > 0.9
    assert not gain([0.5], [1.0], 1).is_one, "one call says nothing about noise"


def test_the_closed_form_is_kept_unless_a_candidate_is_better_beyond_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search's own calls like a candidate; what the others say decides."""
    given = study()
    step = RSparse(budget=0.4, trials=8, calls=2)
    own = {id(flat) for flat in parted(given.data, 2)[0]}
    sense: list[float] = []

    def each(self: Judge, masks: Any) -> list[float]:
        """On its own calls each candidate is better than the one before; on the others as `sense` says."""
        ours = [id(flat) in own for flat in self.data]
        assert all(ours) or not any(ours)
        seen.append(len(self.data))
        rank = len(seen)
        if all(ours):
            return [1.0 / rank for _ in self.data]
        first = rank == min(i for i, n in enumerate(seen, 1) if n == 6)
        return [1.0 + 0.01 * i if first else (1.0 + 0.01 * i) * sense[i] for i in range(6)]

    closed, _ = Decision(RSparse(budget=0.4, budgets=Budgets.SENSITIVITY), given).choose()
    monkeypatch.setattr(Judge, "each", each)
    for sense, kept in (  # noqa: B007
        ([0.9, 1.1, 0.95, 1.08, 0.9, 1.05], "sensitivity"),
        ([0.9, 0.91, 0.92, 0.89, 0.9, 0.91], "searched"),
        ([1.2] * 6, "sensitivity"),
    ):
        seen: list[int] = []
        decision = Decision(step, given)
        choices, record = decision.choose()
        assert record["held_out"]["calls"] == 6 and record["held_out"]["kept"] == kept
        assert len(record["losses"]) == 8
        assert ([c.fraction for c in choices.values()] == [c.fraction for c in closed.values()]) == (
            kept == "sensitivity"
        )


def test_slopes_are_what_the_loss_falls_by() -> None:
    """Against differences of the loss where one group's threshold moves; and the loss itself is the judge's."""
    given = study(6)
    found = Decision(RSparse(budget=0.5, budgets=Budgets.UNIFORM, split="1"), given)
    choices = {group: Choice(0.5) for group in found.groups}
    judge = Judge(given.program, criterion(Loss.AUTO, given.program), given.data)
    slopes = Slopes(given.program, found.samples, judge.measure, judge.data, judge.before)
    loss, by_group = slopes(choices, found.masks(choices))
    assert loss == pytest.approx(judge(found.masks(choices)), rel=1e-5)
    low, high = ends(0.5)
    differences = {}
    for group in found.groups:
        less, more = (judge(found.masks(choices | {group: Choice(f)})) for f in (low, high))
        differences[group] = (less - more) / (high - low)
    gaps = {group.name: (by_group[group], difference) for group, difference in differences.items()}
    most = max(differences.values())
    assert all(abs(slope - difference) < 0.25 * most for slope, difference in gaps.values()), gaps


def test_slopes_move_bytes_to_where_they_are_worth_more() -> None:
    """Kinds whose slopes are twice and half what the curves say; equal slopes change nothing."""
    given = study(2)
    found = Decision(RSparse(budget=0.5, low_rank=LowRankUse.OFF), given)
    costs = (1 - torch.tensor(FRACTIONS)).square().unsqueeze(1)
    curves = {group: Curve(group, (0,), group.bytes * costs) for group in found.groups}
    ones = dict.fromkeys(found.groups, 1.0)
    choices = split(sensitivity(curves, 0.5), curves, {})
    modelled = {
        g: (curves[g].at(ends(c.fraction)[0], 0) - curves[g].at(ends(c.fraction)[1], 0)) for g, c in choices.items()
    }
    same = reweighted(curves, ones, {g: 3 * slope for g, slope in modelled.items()}, choices)
    assert list(same.values()) == pytest.approx([1.0] * len(same), rel=1e-6)
    attention = {g for g in found.groups if "self_attn" in g.name}
    factor = {g: 2.0 if g in attention else 0.5 for g in found.groups}
    after = reweighted(curves, ones, {g: factor[g] * slope for g, slope in modelled.items()}, choices)
    assert min(after[g] for g in attention) > max(after[g] for g in found.groups if g not in attention)
    moved = sensitivity(curves, 0.5, after)
    assert sum(moved[g] * g.bytes for g in attention) > sum(sensitivity(curves, 0.5)[g] * g.bytes for g in attention)
    read = sum(share * g.bytes for g, share in moved.items()) / sum(g.bytes for g in moved)
    assert read == pytest.approx(0.5, abs=1e-6)
    assert all(
        FURTHEST**-0.5 <= w <= FURTHEST**0.5
        for w in reweighted(curves, ones, dict.fromkeys(ones, 1.0), choices).values()
    )


@pytest.mark.slow
def test_budgets_in_turn_are_searched_with_what_was_read_once() -> None:
    step = RSparse(trials=6, calls=2)
    found = searched(step, study(), [0.7, 0.4])
    assert [one.read for one in found] == pytest.approx([0.7, 0.4], abs=2e-3)
    for one in found:
        assert len(one.losses) == 6 and min(one.losses) == one.measured["searched"]
        assert {"sensitivity", "again", "uniform", "channels alone"} <= set(one.measured)
    assert found[0].measured["searched"] < found[1].measured["sensitivity"]
    alone = searched(replace(step, budget=0.4), study(), [0.4])
    assert alone[0].losses == found[1].losses
