"""The rewriter: types are checked, provenance is passed on, actions have stable numbers and can be refused."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import fuseline
from fuseline import Pass, Pipeline, Rule
from fuseline.compiler.action import Action, Observer
from fuseline.compiler.errors import EmptyPassError, PassError, VerificationError
from fuseline.compiler.expressions import Param, Transpose
from fuseline.compiler.observe import Statistics
from fuseline.compiler.pattern import call
from fuseline.compiler.provenance import clean_path, is_ours, makers, source_line, source_lines
from tests.helpers.models import Mlp, ops, traced

aten = torch.ops.aten


class DoubleNegation(Rule):
    def before(self, x):
        return call("neg", -x)

    def after(self, m, new):
        return m.x


class Twice(Rule):
    def before(self, x):
        return x + x

    def after(self, m, new):
        return new(aten.mul.Tensor, m.x, 2)


class Wrong(Rule):
    """Changes the dtype: the builder is at fault."""

    def before(self, x):
        return x + x

    def after(self, m, new):
        return new(aten.to.dtype, m.x, torch.float64)


def one(*rules: Rule, **fields) -> Pass:
    @dataclass(frozen=True)
    class One(Pass):
        name = "one"

        def rules(self, program):
            yield from rules

    return One(**fields)


def doublings(x):
    for _ in range(4):
        x = torch.neg(x)
        x = x + x
    return x


def test_a_rule_that_changes_a_type_is_an_error_with_the_line() -> None:
    program = fuseline.capture(Doubles(), (torch.randn(3),))
    with pytest.raises(VerificationError) as caught:
        Pipeline([one(Wrong())]).run(program)
    text = str(caught.value)
    assert "rewrite #1 one/Wrong at /add#0 changes a value's type" in text
    assert "before: float32[3]" in text and "after:  float64[3]" in text
    assert "test_rewriter.py:" in text


class Doubles(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.exp(x)
        return y + y


def test_new_nodes_know_where_they_come_from() -> None:
    program = fuseline.capture(Doubles(), (torch.randn(3),))
    add = next(n for n in program.graph.nodes if n.name == "add")
    after, _ = Pipeline([one(Twice())]).run(program)
    mul = next(n for n in after.graph.nodes if "mul" in n.name)
    assert makers(mul) == ("one/Twice",)
    assert source_line(mul) == source_line(add) and "test_rewriter.py:" in source_line(mul)
    assert source_lines([mul]) == source_lines([add])
    assert mul.meta["val"].shape == (3,)


def test_the_chain_of_makers_grows() -> None:
    class Back(Rule):
        def before(self, x):
            return x * 2

        def after(self, m, new):
            return new(aten.add.Tensor, m.x, m.x)

    after, report = Pipeline([one(Twice(), Back())]).run(traced(doublings, torch.randn(3)))
    assert report["one"].rules == {"Twice": 4, "Back": 4}
    last = [n for n in after.graph.nodes if "add" in n.name][-1]
    assert makers(last) == ("one/Twice", "one/Back")


def test_actions_are_numbered_alike_at_every_run() -> None:
    numbers = []
    for _ in range(2):
        seen = Statistics()
        Pipeline([one(Twice()), one(DoubleNegation(), allow_empty=True)]).run(traced(doublings, torch.randn(3)), [seen])
        numbers.append([str(action) for action in seen.actions])
    assert numbers[0] == numbers[1]
    assert numbers[0][0] == "#1 one/Twice at /add#0" and len(numbers[0]) == 4


class Only(Observer):
    """Lets the first n rewrites through: what bisection does."""

    def __init__(self, count: int):
        self.count, self.asked = count, []

    def allows(self, action: Action) -> bool:
        self.asked.append(action.number)
        return action.number <= self.count


@pytest.mark.parametrize("count", [0, 2, 4])
def test_an_observer_can_skip_rewrites(count: int) -> None:
    only, x = Only(count), torch.randn(3)
    after, report = Pipeline([one(Twice())]).run(traced(doublings, x), [only])
    assert only.asked == [1, 2, 3, 4]  # the numbers of skipped rewrites are not given to others
    assert report["one"].matched == count and ops(after).count("mul") == count
    assert torch.equal(after.to_module()(x), doublings(x))


def test_a_read_is_not_moved_behind_a_write() -> None:
    def function(x):
        y = torch.neg(x)
        x.add_(1)
        return torch.neg(y)

    with pytest.raises(EmptyPassError, match="written to before its result is used, by aten.add_.Tensor"):
        Pipeline([one(DoubleNegation())]).run(traced(function, torch.randn(3)))

    def harmless(x):
        y = torch.neg(torch.neg(x))
        x.add_(1)
        return y * 1

    x = torch.randn(3)
    after, report = Pipeline([one(Twice(), DoubleNegation())]).run(traced(harmless, x.clone()))
    assert report["one"].matched == 1


def test_results_used_elsewhere_are_kept() -> None:
    def function(x):
        y = torch.neg(x)
        return torch.neg(y), y

    x = torch.randn(3)
    after, _ = Pipeline([one(DoubleNegation())]).run(traced(function, x))
    assert ops(after) == ["neg"]
    assert all(map(torch.equal, after.to_module()(x), function(x)))


def test_overlapping_matches_are_rewritten_once() -> None:
    def function(x):
        return torch.neg(torch.neg(torch.neg(x)))

    x = torch.randn(3)
    after, report = Pipeline([one(DoubleNegation())]).run(traced(function, x))
    assert report["one"].matched == 1 and ops(after) == ["neg"]
    assert torch.equal(after.to_module()(x), -x)


def test_weights_are_made_once_for_one_expression() -> None:
    class Turned(Rule):
        def before(self, x, w):
            return call("linear", x, w)

        def refuse(self, m):
            return None if m.w.op == "get_attr" else "the weight is computed"

        def after(self, m, new):
            turned = new.weight(Transpose(m.w.meta["weight"], 0, 1))
            return new(aten.linear.default, m.x, new(aten.t.default, turned), *m.root.args[2:])

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.fc(x))

    model, x = Shared(), torch.randn(2, 4)
    after, _ = Pipeline([one(Turned())]).run(fuseline.capture(model, (x,)), verification="full")
    turned = [n for n in after.weights() if isinstance(n.meta["weight"], Transpose)]
    assert [n.meta["weight"] for n in turned] == [Transpose(Param("fc.weight"), 0, 1)]
    assert torch.allclose(after.to_module()(x), model(x))


def test_changes_outside_the_rewriter_are_found() -> None:
    @dataclass(frozen=True)
    class Sly(Pass):
        name = "sly"
        allow_empty: bool = True

        def run(self, program, rewriter):
            node = next(n for n in program.graph.nodes if n.op == "call_function")
            node.args = (node.args[0], 2)

    with pytest.raises(PassError, match="pass 'sly' changed the graph outside the rewriter"):
        Pipeline([Sly()]).run(traced(lambda x: x * 3, torch.randn(3)))


def test_a_failing_observer_is_told_of_a_failing_pass() -> None:
    class Told(Observer):
        heard = None

        def failed(self, step, program, error):
            self.heard = (step.name, type(error).__name__)

    told = Told()
    with pytest.raises(VerificationError):
        Pipeline([one(Wrong())]).run(traced(doublings, torch.randn(3)), [told])
    assert told.heard == ("one", "VerificationError")


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("L['self'].model.layers.0.mlp", "model.layers.0.mlp"),
        ("L['self']._modules['model']._modules['layers'][0]", "model.layers.0"),
        ("L['anything'].fc", "fc"), ("L['self']", ""), ("L.fc", "L.fc"), ("", ""),
        ("L['self'].layers.slice(None, 2, None)[1].fc", "layers.1.fc"),
    ],
)  # fmt: skip
def test_module_paths_are_cleaned(raw: str, path: str) -> None:
    assert clean_path(raw) == path


def test_ours_is_judged_by_the_place_not_by_a_folders_name() -> None:
    assert is_ours(torch.__file__) and is_ours(fuseline.__file__)
    assert not is_ours("/home/somebody/fuseline/examples/model.py")
    assert not is_ours("/home/somebody/torch/model.py")


def test_nodes_of_a_whole_pipeline_keep_their_lines() -> None:
    after, _ = Pipeline("quantize{weights=int8},fuse").run(fuseline.capture(Mlp(), (torch.randn(2, 8),)))
    calls = [n for n in after.graph.nodes if n.op in ("call_function", "call_module")]
    assert all(source_lines([n]) for n in calls)
