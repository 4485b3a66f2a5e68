"""A plan within a size holds it at every length that it is used for; a longer sequence gets a plan of its own."""

import pytest
import sympy
import torch
from torch import nn
from torch.utils._sympy.functions import FloorDiv, Mod

from fuseline.passes.checkpointing.lengths import LONGEST, grows, hints, input_bytes, reach
from tests.checkpointing.test_exact import Dropping

s, b = sympy.symbols("s b", positive=True, integer=True)


GROW = [7, sympy.Integer(7), 4 * s, s**2 - s, sympy.expand(b * (s - 1)), 8 * FloorDiv(s + 7, 8), s * FloorDiv(s, 2) - 3]


@pytest.mark.parametrize("size", GROW)
def test_what_is_proved_to_grow_does(size):
    assert grows([size])
    at = [float(sympy.sympify(size).subs({s: n, b: 3})) for n in range(1, 20)]
    assert at == sorted(at)


@pytest.mark.parametrize("size", [100 - s, s**2 - 4 * s, Mod(8 - s, 8), b * s - 2 * b * s, FloorDiv(9 - s, 2), 100 / s])
def test_what_shrinks_somewhere_is_not_proved_to_grow(size):
    assert not grows([4 * s, size])


class Training:
    """Steps of a model at several lengths, and what was recorded of each capture."""

    def __init__(self, memory, options=""):
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Dropping(width=8, rate=0.0) for _ in range(4)))
        self.captures = []
        pipeline = f"raise{{allow_empty}},checkpoint{{policy=budget,memory={memory:.6f}MB{options}}}"
        self.step = torch.compile(
            self.model, backend="fuseline", options={"pipeline": pipeline, "record": self.captures.append}
        )

    def __call__(self, length):
        x = torch.randn(2, length, 8)
        torch._dynamo.mark_dynamic(x, 1)
        self.model.zero_grad()
        self.step(x).square().mean().backward()
        ours = [p.grad.clone() for p in self.model.parameters()]
        self.model.zero_grad()
        self.model(x).square().mean().backward()
        assert all(torch.allclose(a, p.grad, atol=1e-6) for a, p in zip(ours, self.model.parameters()))
        return self.predicted

    @property
    def predicted(self):
        return self.captures[-1].joint.module.meta["checkpoint"]


def owned(model, length):
    return sum(p.numel() * 4 for p in model.parameters()) + 2 * length * 8 * 4


@pytest.mark.slow
def test_a_longer_sequence_is_captured_again_and_a_hopeless_one_refused():
    all_kept = Training(1000.0)
    whole = all_kept(16)["peak"] + owned(all_kept.model, 16)
    assert all_kept.predicted["seconds"] == 0 and all_kept.predicted["longest"] > 1000
    training = Training(whole * 1.3 / 1e6)
    first = training(16)
    assert first["seconds"] == 0 and 16 < first["longest"] < 64
    training(first["longest"])
    assert len(training.captures) == 1
    second = training(first["longest"] + 1)
    assert len(training.captures) == 2
    assert second["seconds"] > 0 and second["longest"] > first["longest"]
    assert second["peak"] + owned(training.model, first["longest"] + 1) <= whole * 1.3
    with pytest.raises(Exception, match="the smallest that can be reached"):
        training(300)


def test_the_reach_is_the_last_length_that_fits():
    from fuseline.passes.checkpointing import Checkpoint, Policy
    from fuseline.passes.checkpointing.lengths import sequence_symbol
    from fuseline.passes.checkpointing.policies import Problem, choose

    training = Training(1000.0)
    training(16)
    program = training.captures[0].joint
    problem = Checkpoint(device="cpu").problem(program)
    symbol = sequence_symbol(problem.tape)
    assert hints(program) == problem.at == {symbol: 16}
    execution = choose(problem, Policy.FULL).execution
    for size in (1e5, 1e6):
        longest = reach(problem, execution, symbol, size)
        taken = []
        for length in (longest, longest + 1):
            there = Problem(problem.tape, problem.machine, {symbol: length})
            taken.append(there.peak(execution) + input_bytes(there.tape, there.at))
        assert taken[0] <= size < taken[1]
    assert reach(problem, execution, symbol, 1.0) == 0
    assert reach(problem, execution, symbol, 1e18) == LONGEST


@pytest.mark.slow
def test_a_plan_for_a_shorter_sequence_than_the_one_at_hand_is_refused():
    all_kept = Training(1000.0)
    whole = all_kept(16)["peak"] + owned(all_kept.model, 16)
    with pytest.raises(Exception, match="target_seq= of the longest sequence"):
        Training(whole / 1e6, ",target_seq=16")(200)
