"""The best plan as a function of the length: where it changes, and what it changes to."""

from dataclasses import replace

import pytest

from fuseline.compiler.machine import MACHINES
from fuseline.compiler.tape import tape
from fuseline.models.shapes import Shape
from fuseline.passes.checkpointing import sequence_symbol
from fuseline.passes.checkpointing.policies import Policy, Problem, choose
from fuseline.planning import by_length, joint_of_shape
from fuseline.planning.switches import _joined

pytestmark = pytest.mark.slow
ROOM = 2e9
LAYERS = 16


@pytest.fixture(scope="module")
def traced():
    return tape(joint_of_shape(Shape(256, 688, 4, 4, 2, 1000), loss=False))


@pytest.fixture(scope="module")
def problem_at(traced):
    symbol = sequence_symbol(traced)
    return lambda length: Problem(traced, MACHINES["h100"], {symbol: length}, layers=LAYERS, patience=30.0)


@pytest.fixture(scope="module")
def plans(traced, problem_at):
    return by_length(problem_at, sequence_symbol(traced), ROOM, LAYERS, 1024, 6)


def test_plans_follow_one_another(plans):
    assert len(plans) == 6 and plans[0].first == 1024 and plans[0].seconds == 0 < plans[1].seconds
    for one, other in zip(plans, plans[1:]):
        assert other.first == one.last + 1
        assert one.formula.at(one.last) <= ROOM
        assert other.share >= 0.95 * one.share  # the solver's bound is not tight: it may give a little back
    assert plans[-1].share > 2 * plans[1].share
    assert plans[0].formula.at(plans[0].last + 1) > ROOM


def test_nothing_fits_a_hopeless_length(traced, problem_at):
    assert by_length(problem_at, sequence_symbol(traced), ROOM, LAYERS, 10_000_000, 3) == []


def test_the_formula_is_the_plans_peak_at_any_length(plans, problem_at):
    for one in plans[:: max(1, len(plans) // 3)]:
        for length in (one.first, one.last, 3 * one.last):
            peak = problem_at(length).peak(one.choice.execution)
            assert abs(one.formula.at(length) / peak - 1) < 1e-9


def test_no_other_plan_is_faster_within_a_stretch(plans, problem_at):
    """At a stretch's ends and its middle, neither the solver's choice there nor any other plan that fits."""
    for one in plans[:: max(1, len(plans) // 3)]:
        for length in ((one.first + one.last) // 2, one.last):
            problem = problem_at(length)
            ours = problem.time(one.choice.execution)
            assert problem.peak(one.choice.execution) <= ROOM
            anew = problem.time(choose(problem, Policy.BUDGET, ROOM).execution)
            fits = [p for p in plans if p.formula.at(length) <= ROOM]
            best = min(anew, *(problem.time(p.choice.execution) for p in fits))
            assert ours <= best * 1.005 + 1e-3 * problem.step_seconds


def test_a_plan_that_is_slower_throughout_goes(plans, problem_at):
    """And one that is not stays, whatever is behind it."""
    slow = replace(plans[-1], first=plans[0].last + 1, last=plans[1].last)
    fast = replace(plans[1], first=plans[1].last + 1, last=plans[1].last + 10)
    joined = _joined(problem_at, [plans[0], slow], fast)
    assert joined == [plans[0], replace(fast, first=slow.first)]
    assert _joined(problem_at, [plans[0]], plans[1]) == plans[:2]
