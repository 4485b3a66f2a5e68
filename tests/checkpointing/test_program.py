"""The integer program against every choice there is, on blocks small enough to try them all."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fuseline.compiler.machine import MACHINES
from fuseline.compiler.tape import tape
from fuseline.passes.checkpointing.policies import Problem
from fuseline.passes.checkpointing.program import relevant, solve
from tests.helpers.joint import Traced


class Chain(torch.nn.Module):
    """A row of small steps on one vector, widths as given."""

    def __init__(self, widths):
        super().__init__()
        torch.manual_seed(0)
        pairs = zip([4, *widths], [*widths, 4])
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(a, b)) for a, b in pairs)

    def forward(self, x):
        for i, w in enumerate(self.weights):
            x = torch.tanh(x @ w) if i % 2 else (x @ w) * (x.sum() + 2)
        return x.square().sum()


def every_choice(problem):
    """Peak and time of each set of storages that the backward could be given."""
    wanted = sorted(relevant(problem.tape))
    for size in range(len(wanted) + 1):
        for saved in itertools.combinations(wanted, size):
            execution = problem.run(saved)
            yield problem.peak(execution), problem.time(execution)


def problem_of(widths):
    return Problem(tape(Traced(Chain(widths), torch.randn(16, 4)).program()), MACHINES["cpu"], {})


@settings(max_examples=5, deadline=None)
@given(st.lists(st.sampled_from((2, 8, 24)), min_size=1, max_size=2), st.sampled_from((0.3, 0.6, 0.9)))
def test_the_solvers_choice_is_the_best_of_all(widths, share):
    problem = problem_of(widths)
    assert len(relevant(problem.tape)) <= 12
    choices = list(every_choice(problem))
    low, high = min(p for p, _ in choices), max(p for p, _ in choices)
    limit = low + share * (high - low)
    solution = solve(problem.sections, problem.sizes, problem.seconds, problem.limits(memory=limit), 20)
    assert solution is not None and solution.gap <= 1e-3
    execution = problem.run(solution.saved)
    assert problem.peak(execution) <= solution.bound * (1 + 1e-6) <= limit * (1 + 1e-5)  # the bound is one
    best = min(t for p, t in choices if p <= limit)
    ours = problem.time(execution)
    assert ours >= best * (1 - 1e-9)
    # calls that run again before one event are counted as alive together: what that costs is at most one burst
    within = min(t for p, t in choices if p <= limit - _burst(problem)) if limit - _burst(problem) >= low else None
    if within is not None:
        assert ours <= within * (1 + 2e-3) + 1e-9


def _burst(problem):
    """Bytes of the largest value: what runs again before an event is counted with one more of them at most."""
    return 2 * float(max(problem.sizes[problem.tape.storages[s].size] for s in relevant(problem.tape)))


def test_what_must_be_kept_is_and_what_must_not_is_not():
    problem = problem_of([8, 24])
    some = sorted(relevant(problem.tape))
    solution = solve(problem.sections, problem.sizes, problem.seconds, problem.limits(kept=some[:2], again=some[3:5]))
    assert set(some[:2]) <= solution.saved and not set(some[3:5]) & solution.saved


@pytest.mark.one_in(2)
@pytest.mark.parametrize("blocks", [32, 128])
def test_a_deep_stack_is_solved_in_time(blocks):
    """One block is solved for all of them: the time of the solver does not grow with their number."""
    import time

    from fuseline.models.shapes import Shape
    from fuseline.passes.checkpointing import sequence_symbol
    from fuseline.passes.checkpointing.policies import Policy, choose
    from fuseline.planning import joint_of_shape

    found = tape(joint_of_shape(Shape(256, 688, 4, 4, 2, 1000)))
    problem = Problem(found, MACHINES["h100"], {sequence_symbol(found): 8192}, layers=blocks)
    high = problem.peak(problem.run(problem.everything))
    began = time.process_time()
    choice = choose(problem, Policy.BUDGET, 0.5 * high)
    assert time.process_time() - began < 2
    assert problem.peak(choice.execution) <= 0.5 * high
