"""Near misses: the constraint that failed is named, with its node, module and line; refusals are quoted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx import Node

import fuseline
from fuseline.compiler.action import Observer
from fuseline.compiler.debug import why as engine
from fuseline.compiler.debug.closest import NearMiss, closest
from fuseline.compiler.debug.near_miss import explain
from fuseline.compiler.debug.pattern_text import text_of
from fuseline.compiler.debug.where import locate
from fuseline.compiler.errors import UserError
from fuseline.compiler.pattern import Either, Scalar, Term, Var, call, find, maybe_cast, square
from fuseline.compiler.program import Program
from fuseline.compiler.rewriter import Builder
from fuseline.compiler.rule import Rule, searching
from fuseline.compiler.structure import structural_hash
from fuseline.passes.quantize import Quantize
from fuseline.passes.raising import Raise
from tests.helpers.models import Mlp, tiny_llama, traced

aten = torch.ops.aten
NORM = "model.layers.1.input_layernorm"
PATTERN = "h * rsqrt(mean(pow(h, 2), dim=dims, keepdim=True) + eps)"


@pytest.fixture(scope="module")
def captured() -> Program:
    return fuseline.capture(tiny_llama(), (torch.arange(16)[None],), {"use_cache": False})


@pytest.fixture
def program(captured: Program) -> Program:
    return captured.copy()


def norm(program: Program, target: Any) -> Node:
    """The one call of an op in the third of five norms."""
    (node,) = [n for n in locate(program, NORM).nodes if n.target is target]
    return node


def cube(program: Program) -> Node:
    node = norm(program, aten.pow.Tensor_Scalar)
    node.args = (node.args[0], 3)
    return node


def forget_keepdim(program: Program) -> Node:
    node = norm(program, aten.mean.dim)
    node.args = (*node.args[:2], False)
    return node


def sqrt(program: Program) -> Node:
    node = norm(program, aten.rsqrt.default)
    node.target = aten.sqrt.default
    return node


def total(program: Program) -> Node:
    node = norm(program, aten.mean.dim)
    node.target = aten.sum.dim_IntList
    return node


def others_square(program: Program) -> Node:
    node = norm(program, aten.pow.Tensor_Scalar)
    node.args = (next(n for n in program.graph.nodes if n.target is aten.embedding.default), 2)
    return node


def negate(program: Program) -> Node:
    node = norm(program, aten.rsqrt.default)
    with program.graph.inserting_before(node):
        new = program.graph.call_function(aten.neg.default, (node.args[0],))
    new.meta = dict(node.meta)
    node.args = (new,)
    return new


def add_instead(program: Program) -> Node:
    node = next(iter(norm(program, aten.rsqrt.default).users))
    node.target = aten.add.Tensor
    return node


def write(program: Program) -> Node:
    node = norm(program, aten.mean.dim)
    node.meta = {**node.meta, "written": True}
    return node


BREAKS: list[tuple[Callable[[Program], Node], str, str]] = [
    (cube, "expected the number 2, found 3", "2"),
    (forget_keepdim, "expected keepdim=True, found False", "keepdim=True"),
    (sqrt, "expected op rsqrt, found sqrt", "rsqrt"),
    (total, "expected op mean, found sum", "mean"),
    (others_square, "variable h is bound to two different values (add_8 and embedding)", "h"),
    (negate, "op neg stands between, which the pattern does not have", "mean(pow(h, 2), dim=dims, keepdim=True) + eps"),
    (add_instead, "expected op mul, found add", "*"),
    (write, "mean_2 is written to in place, or shares memory with what is", "mean"),
]


@pytest.mark.parametrize(("damage", "text", "marked"), BREAKS, ids=[d.__name__ for d, _, _ in BREAKS])
def test_what_a_broken_norm_misses(program: Program, damage: Callable, text: str, marked: str) -> None:
    """One of five norms is broken: the rule misses that one, and says what it is."""
    node = damage(program)
    (found,) = [e for e in engine.why(program, Raise(), "RMSNorm", NORM) if e.misses]
    assert found.verdict == "no match"
    (miss,) = found.misses
    (problem,) = miss.problems
    assert problem.text == text and problem.node == node.name and problem.call.startswith(f"{node.name} = ")
    assert problem.module == NORM and ".py:" in problem.line
    assert miss.share > 0.8 and miss.pattern == PATTERN
    start = miss.marks.index("^")
    assert miss.pattern[start : start + miss.marks.count("^")] == marked


@pytest.mark.parametrize("damage", [d for d, _, _ in BREAKS], ids=lambda d: d.__name__)
def test_the_near_misses_of_a_whole_program_are_the_broken_place(program: Program, damage: Callable) -> None:
    damage(program)
    found = engine.why(program, Raise(), "RMSNorm")
    assert sum(len(e.fits) for e in found) == 4
    (miss,) = [m for e in found for m in e.misses]
    assert {NORM} == {p.module for p in miss.problems}


def test_a_sound_program_has_no_near_miss(captured: Program) -> None:
    for explanation in engine.why(captured, Raise()):
        assert not explanation.misses, explanation.rule


def test_a_norm_broken_twice(program: Program) -> None:
    cube(program)
    sqrt(program)
    found = engine.best_of(engine.why(program, Raise(), "RMSNorm", NORM))
    texts = {p.text for p in found.misses[0].problems}
    assert texts == {"expected the number 2, found 3", "expected op rsqrt, found sqrt"}


def test_a_refusal_is_quoted(program: Program) -> None:
    mean = norm(program, aten.mean.dim)
    mean.args = (mean.args[0], [1], True)
    found = engine.best_of(engine.why(program, Raise(), "RMSNorm", NORM))
    assert found.verdict == "refused"
    (fit,) = found.fits
    assert fit.refusal == "the mean runs over the dimensions [1] of 3, not over the last one"
    assert any(text.startswith("mean_2 = mean(") for text in fit.nodes)


@pytest.mark.parametrize(
    "place", [NORM, f"{NORM}/mul#0", f"{NORM}/mean#0", "rsqrt_2"], ids=["module", "root", "site inside", "node"]
)
def test_a_match_is_told_with_its_nodes(captured: Program, place: str) -> None:
    found = engine.best_of(engine.why(captured, Raise(), "rmsnorm", place))
    assert found.verdict == "matches" and not found.misses and found.place == place
    assert [text.split(" = ")[1].split("(")[0] for text in found.fits[0].nodes] == [
        "pow", "mean", "add", "rsqrt", "mul", "mul",
    ]  # fmt: skip
    assert found.fits[0].module == NORM and found.location.split(":")[0].endswith("raising/rms_norm.py")


def test_a_line_of_code_names_all_that_came_of_it(captured: Program) -> None:
    line = locate(captured, NORM).nodes[0].meta["stack_trace"].rsplit('File "', 1)[1]
    file, number = line.split('"')[0].rsplit("/", 1)[1], line.split("line ")[1].split(",")[0]
    found = engine.best_of(engine.why(captured, Raise(), "RMSNorm", f"{file}:{number}"))
    assert len(found.fits) == 5


def test_explaining_changes_nothing(captured: Program) -> None:
    before = structural_hash(captured)
    engine.why(captured, Raise())
    for rule in Raise().rules(captured):
        json.dumps(explain(captured, rule, NORM).to_json())
    assert structural_hash(captured) == before


def test_it_says_what_the_pipeline_does(captured: Program) -> None:
    """Each site that a pass rewrites is explained as a match of that rule."""

    class Sites(Observer):
        def __init__(self) -> None:
            self.seen: list[tuple[str, str]] = []

        def rewritten(self, action: Any, program: Any) -> None:
            self.seen.append((action.rule, action.site))

    sites = Sites()
    fuseline.Pipeline("raise").run(captured, [sites])
    explained = [(f.rule, f.site) for e in engine.why(captured, Raise()) for f in e.fits if f.refusal is None]
    assert sorted(explained) == sorted(sites.seen)


def test_the_lenient_matcher_agrees_with_the_strict_one(captured: Program) -> None:
    """What it finds without a failure is what the matcher finds, at every node, for every pattern of the pass."""
    with searching() as searched:
        for rule in Raise().rules(captured):
            list(rule.matches(captured))
    assert len(searched.terms) >= 8
    for term in searched.terms:
        for node in captured.graph.nodes:
            miss = closest(term, node)
            assert (miss is not None and not miss.problems) == (find(term, node) is not None), (node, text_of(term))


def test_what_an_earlier_rule_took(captured: Program) -> None:
    found = engine.best_of(engine.why(captured, Raise(), "SwiGLU", NORM))
    assert found.verdict == "no match"
    assert found.notes == [f"before this rule, the pass rewrote what stood there: #3 raise/RMSNorm at {NORM}/mul#1"]


def test_a_place_is_followed_through_the_rewrites_before(captured: Program) -> None:
    """RepeatedHeads takes what Attention made of the call that the place names."""
    found = engine.best_of(engine.why(captured, Raise(), "RepeatedHeads", "scaled_dot_product_attention_1"))
    assert found.verdict == "matches" and found.fits[0].root.startswith("attention")


def test_a_rule_without_a_pattern_says_where_it_looks(captured: Program) -> None:
    found = engine.best_of(engine.why(captured, Raise(), "RepeatedHeads", NORM))
    assert found.verdict == "no match" and "looks for its sites by itself" in found.notes[0]
    assert "raising/repeat_kv.py:" in found.notes[0]


def test_a_gate_that_is_none() -> None:
    """SwiGLU has one pattern for an activation, in `matches` of its base class."""
    before = traced(lambda g, u: F.hardswish(g) * u, torch.randn(4, 8), torch.randn(4, 8))
    after = traced(lambda g, u: (g * torch.tanh(g)) * u, torch.randn(4, 8), torch.randn(4, 8))
    swiglu = lambda p: next(r for r in Raise().rules(p) if r.name == "SwiGLU")
    (miss,) = explain(before, swiglu(before), "mul").misses
    assert miss.problems[0].text == "expected op silu, found hardswish"
    (miss,) = explain(after, swiglu(after), "mul_1").misses
    assert miss.problems[0].text == "expected op sigmoid, found tanh" and miss.pattern == "gate * sigmoid(gate) * up"


def test_a_rule_that_passes_over_what_fits() -> None:
    """[−b, a] of other tensors is no rotation: the pattern fits, and the rule's own check says no."""

    def function(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x * 0.5 + torch.cat((-b, a), -1) * x

    program = traced(function, torch.randn(4, 8), torch.randn(4, 4), torch.randn(4, 4))
    rotary = next(r for r in Raise().rules(program) if r.name == "Rotary")
    found = explain(program, rotary, "add")
    assert found.verdict == "no match" and "passes over it" in found.notes[0] and "rotary.py:" in found.notes[0]


def test_a_pass_with_a_run_of_its_own() -> None:
    torch.manual_seed(0)
    program = fuseline.capture(Mlp(), (torch.randn(4, 8),))
    (taken,) = engine.why(program, Quantize(weights="int8"), "linear", "gate/linear#0")
    assert taken.verdict == "matches" and taken.fits[0].rule == "linear"
    (refused,) = engine.why(program, Quantize(weights="int4:g64"), "linear", "gate/linear#0")
    assert refused.verdict == "refused" and "64" in refused.fits[0].refusal
    (left,) = engine.why(program, Quantize(weights="int8"), "linear", "silu")
    assert left.verdict == "no match" and "never considered this site" in left.notes[0]
    (wrong,) = engine.why(program, Quantize(weights="int8"), "linaer", "gate/linear#0")
    assert "no rewrite of this pass is called 'linaer' here; it made 3 linear" in wrong.notes


# --- Names -------------------------------------------------------------------------------------------------------


def test_rules_and_passes_by_name(captured: Program) -> None:
    assert engine.parse("raise/RmsNorm", captured) == (Raise(), "RmsNorm")
    assert engine.parse("swiglu", captured) == (Raise(), "swiglu")
    assert engine.parse("raise", captured) == (Raise(), None)
    step, rule = engine.parse("quantize{weights=int4:g64,only=a/b}/linear", captured)
    assert isinstance(step, Quantize) and step.weights == "int4:g64" and rule == "linear"
    assert engine.parse("quantize", captured)[0].weights == "int8", "a bare name stands for the pass's example"
    with pytest.raises(UserError, match="did you mean 'raise'"):
        engine.parse("rais/RMSNorm", captured)
    with pytest.raises(UserError, match="did you mean 'RMSNorm'"):
        engine.why(captured, Raise(), "RMSNrm")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("model.layers.1.input_layernrm", f"did you mean '{NORM}'"),
        ("layers.1.input_layernorm", f"did you mean '{NORM}'"),
        (f"{NORM}/mul#7", f"did you mean '{NORM}/mul#"),
        ("rsqrt_99", "did you mean 'rsqrt"),
        ("modeling_llama.py:1", "of modeling_llama.py the program has the lines"),
        ("§", "no site, module, node or line is called '§'"),
    ],
)
def test_an_unknown_place(captured: Program, wrong: str, right: str) -> None:
    with pytest.raises(UserError) as raised:
        locate(captured, wrong)
    assert right in raised.value.headline


# --- The text of patterns ----------------------------------------------------------------------------------------

X, Y = Var("x"), Var("y")


@pytest.mark.parametrize(
    ("term", "text"),
    [
        (X * (Y + 1), "x * (y + 1)"),
        (X - (Y - X), "x - (y - x)"),
        (X / Y * X, "x / y * x"),
        (-(X + Y), "-(x + y)"),
        (call("cat", [-Y, X], dim=Var("dim")), "cat([-y, x], dim=dim)"),
        (call("gelu", X, approximate="tanh"), "gelu(x, approximate='tanh')"),
        (X * 0.044715 + Scalar("eps"), "x * 0.044715 + eps"),
        (Either((call("silu", X), X * call("sigmoid", X))), "silu(x)"),
        (maybe_cast(square(X)) @ Y, "pow(x, 2) @ y"),
    ],
)
def test_a_pattern_reads_as_python(term: Term, text: str) -> None:
    assert text_of(term) == text


class Pairs(Rule):
    """sub(cat([a, b]), cat([b, a])), for what near misses do with lists and scalars."""

    def before(self, a: Var, b: Var, s: Scalar) -> Term:  # type: ignore[override]
        return call("sub", call("cat", [a, b]), call("cat", [b, a])) * s

    def after(self, m: Any, new: Builder) -> Node:
        return new(aten.mul.Scalar, m.a, 0)


def missed(function: Callable, *args: torch.Tensor) -> NearMiss:
    program = traced(function, *args)
    return explain(program, Pairs(), "mul").misses[0]


def test_lists_and_scalars() -> None:
    a, b = torch.randn(2, 4), torch.randn(2, 4)
    assert explain(traced(lambda a, b: (torch.cat((a, b)) - torch.cat((b, a))) * 2.0, a, b), Pairs()).fits
    other = missed(lambda a, b: (torch.cat((a, b)) - torch.cat((b, b))) * 2.0, a, b)
    assert other.problems[0].text == "variable a is bound to two different values (the input a and the input b)"
    assert other.pattern == "(cat([a, b]) - cat([b, a])) * s"
    assert other.marks == " " * other.pattern.rindex("a") + "^"
    tensor = missed(lambda a, b: (torch.cat((a, b)) - torch.cat((b, a))) * torch.cat((a, b)), a, b)
    assert tensor.problems[0].text.startswith("expected a number for s, found cat")
    shorter = missed(lambda a, b: (torch.cat((a, b)) - torch.cat((b,))) * 2.0, a[:1], b[:1])
    assert shorter.problems[0].text.startswith("expected cat([b, a]), found cat")
