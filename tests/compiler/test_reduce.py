"""Reduction: a fault among many rewrites comes down to a few nodes, and stays the fault that it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F

import fuseline
from fuseline import Pass, Pipeline, Program, UserError
from fuseline.compiler.debug.check import Check, Verdict
from fuseline.compiler.debug.extract import calls, extract
from fuseline.compiler.debug.rebuild import rebuild
from fuseline.compiler.debug.reduce import Reduction, reduce
from fuseline.compiler.debug.search import Case, minimise
from fuseline.compiler.debug.values import Values
from fuseline.compiler.precision import floats
from fuseline.compiler.stage.render import code
from fuseline.compiler.verifier import verify
from tests.helpers import faulty
from tests.helpers.models import Mlp

aten = torch.ops.aten


class Blocks(torch.nn.Module):
    """Attention and a gated MLP, twice."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.attention = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width) for _ in range(2))
        self.mlps = torch.nn.ModuleList(Mlp(width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for attention, mlp in zip(self.attention, self.mlps):
            q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in attention(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
            x = mlp(x)
        return x


@cache
def blocks() -> Program:
    torch.manual_seed(0)
    rows = {"x": {1: torch.export.Dim.AUTO}}
    return fuseline.capture(Blocks().eval(), (torch.randn(1, 4, 8),), dynamic=rows)


def reduced(pipeline: str | Pipeline, check: str = "any", program: Program | None = None, **options) -> Reduction:
    return reduce(program or blocks(), Pipeline(pipeline), Check.parse(check), **options)


@cache
def moved_scale() -> Reduction:
    return reduced("wrong-scale{at=1},fuse")


def targets(reduction: Reduction) -> list[str]:
    return [str(n.target) for n in calls(reduction.after.program)]


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("pipeline", "kind", "left"),
    [
        ("wrong-scale{at=1},fuse", "error", ["aten.silu.default"]),
        ("dropped-residual,raise{allow_empty}", "error", ["aten.add.Tensor"] * 2),
        ("crash", "crash", ["aten.scaled_dot_product_attention.default"]),
        ("crash{inside=false}", "crash", ["aten.scaled_dot_product_attention.default"]),
        ("wrong-meta,fuse", "verify", ["aten.silu.default"]),
        ("wrong-at-one-size", "error", ["aten.silu.default"]),
    ],
)
def test_a_fault_comes_down_to_the_nodes_of_its_rule(pipeline: str, kind: str, left: list[str]) -> None:
    found = moved_scale() if "at=1" in pipeline else reduced(pipeline)
    assert found.verdict.kind == kind and found.complete
    assert targets(found) == left and len(calls(found.before.program)) > 50
    assert len(found.after.pipeline.passes) == 1 and not found.after.program.weights()
    verify(found.after.program, "full")


def test_the_culprit_is_named() -> None:
    found = moved_scale()
    assert found.culprit is not None and found.culprit.to_json()["rule"] == "OffByAPercent"
    assert found.culprit.site == "mlps.1/silu#0" and "faulty.py:" in found.culprit.location
    assert "helpers/models.py:" in found.culprit.line


def test_sizes_symbols_and_options_go_where_the_fault_does_not_need_them() -> None:
    found = moved_scale()
    assert str(found.after.pipeline) == "wrong-scale"
    assert [tuple(n.meta["val"].shape) for n in found.after.program.placeholders] == [(1, 2, 2)]
    kept = reduced("wrong-at-one-size")  # it shows at other sizes than the captured one alone
    (x,) = kept.after.program.placeholders
    assert any(isinstance(size, torch.SymInt) for size in x.meta["val"].shape)


def test_two_reductions_are_the_same() -> None:
    first, second = (reduced("dropped-residual") for _ in range(2))
    assert code(first.after.program) == code(second.after.program) and first.checks == second.checks


@dataclass(frozen=True)
class Fragile(Pass):
    """Wrong at the products with silu; at fewer than `least` nodes it crashes, or another rule is wrong at others."""

    name = "fragile"
    least: int = 6
    how: str = "crash"

    def run(self, program, rewriter):
        small = len(calls(program)) < self.least
        if small and self.how == "crash":
            raise ValueError("this is another fault")
        for node in [n for n in program.graph.nodes if n.target is aten.mul.Tensor]:
            gated = getattr(node.args[0], "target", None) is aten.silu.default
            factor = 1.5 if gated or small else 1.0
            again = lambda new, node=node, factor=factor: new(aten.mul.Tensor, new(node.target, *node.args), factor)
            rewriter.rewrite(node, [node], again, "gated" if gated else "plain")


def test_what_fails_in_another_way_is_not_taken() -> None:
    found = reduced(Pipeline([Fragile()]), "any")
    assert found.verdict.kind == "error" and len(calls(found.after.program)) == 6  # with one fewer it crashes


def test_what_another_rule_is_to_blame_for_is_not_taken() -> None:
    found = reduced(Pipeline([Fragile(how="wrong")]), "error")
    assert found.culprit.rule == "gated"
    assert targets(found) == ["aten.silu.default", "aten.mul.Tensor"]  # the product alone is wrong by "plain"


def test_a_fault_that_shows_at_times() -> None:
    found = reduced("at-times", "error", repeat=6)
    assert targets(found) == ["aten.silu.default"]


def test_what_never_ends() -> None:
    found = reduced("endless", "hang:0.5")
    assert found.verdict.kind == "hang" and targets(found) == ["aten.silu.default"]
    assert found.check.seconds >= 5  # recorded with time to spare, for busy machines


def test_a_limit_keeps_the_best_so_far() -> None:
    better: list[Case] = []
    found = reduced("dropped-residual,fuse", most=4, improved=lambda case, verdict: better.append(case))
    assert not found.complete and found.checks == 4
    assert better and found.after is better[-1] and found.after.nodes < found.before.nodes


@pytest.mark.slow
def test_ctrl_c_keeps_the_best_so_far() -> None:
    def stop(case: Case, verdict: Verdict) -> None:
        if case.nodes < 10:
            raise KeyboardInterrupt

    found = reduced("wrong-scale{at=1},fuse", improved=stop)
    assert found.interrupted and not found.complete and found.after.nodes < 10


def test_a_sound_pipeline_is_nothing_to_reduce() -> None:
    with pytest.raises(UserError, match="nothing to reduce: nothing is wrong with fuse here\n  checked for: any"):
        reduced("fuse")
    with pytest.raises(UserError, match="does not fail as it did: crash: no such thing"):
        reduced("wrong-scale", wanted=Verdict("crash", "no such thing"))


def test_delta_debugging_is_minimal() -> None:
    needed = {"3", "11", "12"}
    asked: list[list[str]] = []
    kept = [str(i) for i in range(40)]

    def test(items: list[str]) -> bool:
        nonlocal kept
        asked.append(items)
        if needed <= set(items):
            kept = items
            return True
        return False

    assert minimise(list(kept), test) and set(kept) == needed
    assert len(asked) < 100


def test_a_cut_computes_what_it_did_inside() -> None:
    program = blocks()
    whole = Values(program).of(calls(program))
    names = [n.name for n in calls(program)]
    middle = set(names[10:20])
    cut = extract(program, middle, Values(program), escaping=True)
    verify(cut, "full")
    back = [n.name for n in cut.graph.output_node().args[0]]
    assert back and set(back) <= middle
    for name, value in zip(back, floats(cut.run(cut.examples)), strict=True):
        torch.testing.assert_close(value, whole[name], rtol=0, atol=0)


class Noted(torch.nn.Module):
    def forward(self, x: torch.Tensor, notes: torch.Tensor) -> torch.Tensor:
        y = torch.relu(x) * 2
        notes[0].copy_(y)
        return y + notes.sum()


def test_a_write_stays_a_write_of_the_cut() -> None:
    program = fuseline.capture(Noted(), (torch.randn(3), torch.zeros(2, 3)))
    assert program.mutated == {"notes"}
    names = {n.name for n in calls(program) if n.target is not aten.relu.default}
    cut = extract(program, names, Values(program))
    assert cut.mutated == {"notes"} and [n.name for n in cut.placeholders] == ["relu", "notes"]
    without = extract(program, {n.name for n in calls(program) if n.target is aten.mul.Tensor}, Values(program))
    assert without.mutated == frozenset()


def test_a_program_at_other_sizes() -> None:
    program = extract(blocks(), {n.name for n in calls(blocks()) if "linear" in n.name}, Values(blocks()))
    double: Callable[[int], int] = lambda n: n // 8 * 4 if n % 8 == 0 else n
    small = rebuild(program, static=True, size=double)
    verify(small, "full")
    assert all(isinstance(s, int) for n in small.placeholders for s in n.meta["val"].shape)
    assert {tuple(s.tensor.shape)[-1] for s in small.sources.values()} <= {4, 8, 12}
    assert all(x.isfinite().all() for x in floats(small.run(small.examples)))
    wide = rebuild(program, dtypes={torch.float32: torch.float64})
    assert {x.dtype for x in floats(wide.run(wide.examples))} == {torch.float64}
    assert rebuild(blocks(), size=lambda n: 3 if n == 8 else n) is None  # 24 = 3 · 8 no longer fits


def test_the_faulty_passes_are_what_they_say() -> None:
    """What the tests above reduce is there before: each pass goes wrong on the whole model, in its way."""
    kinds = {"wrong-scale": "error", "dropped-residual": "error", "crash": "crash", "wrong-meta": "verify"}
    for name, kind in kinds.items():
        assert Check.parse("any")(blocks(), Pipeline(name)).kind == kind
    assert faulty.WrongScale.__module__ == "tests.helpers.faulty"
