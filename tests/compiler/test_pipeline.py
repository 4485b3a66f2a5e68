"""Pipelines: printing and parsing are inverses; every mistake gets one clear error, with the nearest valid word."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st

import fuseline
from fuseline import Level, Pass, Pipeline, Rule, Tier, UserError
from fuseline.compiler.errors import EmptyPassError, ExpectationError, FuselineError, PassError
from fuseline.compiler.framework import options
from fuseline.compiler.observe import Limit
from tests.helpers.models import ops, registered, traced
from tests.strategies import settings  # noqa: F401  the profile of the project's fuzz tests

aten = torch.ops.aten


class Colour(enum.Enum):
    RED = "red"
    PALE_BLUE = "pale blue"


class Twice(Rule):
    """x + x → 2x."""

    def before(self, x):
        return x + x

    def refuse(self, m):
        return "the operand is an input" if m.x.op == "placeholder" else None

    def after(self, m, new):
        return new(aten.mul.Tensor, m.x, 2)


@dataclass(frozen=True)
class Double(Pass):
    """Doubles."""

    name = "double"
    ensures = frozenset({"doubled"})

    times: int = 3
    factor: float = 0.5
    eager: bool = False
    lazy: bool = True
    colour: Colour = Colour.RED
    label: str = "plain"
    where: str | None = None
    paths: tuple[str, ...] = ()
    sizes: tuple[int, ...] = (1, 2)

    def rules(self, program):
        yield Twice()


@dataclass(frozen=True)
class After(Pass):
    name = "after"
    requires = frozenset({"doubled"})

    def rules(self, program):
        yield Twice()


@dataclass(frozen=True)
class Joint(Pass):
    name = "joint"
    level = Level.JOINT

    def rules(self, program):
        yield Twice()


@dataclass(frozen=True)
class Lossy(Pass):
    name = "lossy"
    tier = Tier.LOSSY

    def rules(self, program):
        yield Twice()


@pytest.fixture(autouse=True)
def _passes():
    with registered(Double, After, Joint, Lossy):
        yield


def twice():
    def function(x):
        y = torch.neg(x)
        return y + y

    return traced(function, torch.randn(3))


text = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
part = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="|"), min_size=1, max_size=6)
doubles = st.builds(
    Double,
    times=st.integers(),
    factor=st.floats(allow_nan=False),
    eager=st.booleans(),
    lazy=st.booleans(),
    colour=st.sampled_from(Colour),
    label=text,
    where=st.none() | text.filter(lambda t: t != "none"),
    paths=st.lists(part, max_size=3).map(tuple),
    sizes=st.lists(st.integers(), max_size=3).map(tuple),
    expect=st.lists(
        st.builds("{}:{}".format, st.sampled_from(("A", "linear + add")), st.integers(0)) | st.just("7"), max_size=2
    ).map(tuple),
    allow_empty=st.booleans(),
)
quantizers = st.builds(
    fuseline.passes.Quantize,
    weights=st.sampled_from(("int8", "int4:g64", "int4:g32:sym", "int8:channel:asym")),
    activations=st.none() | st.sampled_from(("int8", "int8:token")),
    only=st.lists(part, max_size=2).map(tuple),
    skip=st.lists(part, max_size=2).map(tuple),
)
fuses = st.builds(fuseline.passes.Fuse, linears=st.booleans())
pipelines = st.lists(doubles | quantizers | fuses, min_size=1, max_size=4)


@given(pipelines)
def test_parsing_what_was_printed_gives_the_same_pipeline(passes: list[Pass]) -> None:
    pipeline = Pipeline(passes)
    assert Pipeline(str(pipeline)) == pipeline
    assert str(Pipeline(str(pipeline))) == str(pipeline)
    assert hash(Pipeline(str(pipeline))) == hash(pipeline)


@given(passes=pipelines)
def test_a_toml_file_says_the_same(passes: list[Pass], tmp_path_factory: pytest.TempPathFactory) -> None:
    import json

    lines = []
    for step in passes:
        lines += ["[[pass]]", f'name = "{step.name}"']
        for field in options(type(step)):
            value = getattr(step, field.name)
            if value is None:
                continue
            value = value.value if isinstance(value, enum.Enum) else value
            simple = json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
            simple = "inf" if simple == "Infinity" else "-inf" if simple == "-Infinity" else simple
            lines.append(f"{field.name} = {simple}".replace("\x7f", "\\u007f"))
    path = tmp_path_factory.mktemp("toml") / "pipeline.toml"
    path.write_bytes("\n".join(lines).encode())
    assert Pipeline(path) == Pipeline(passes) == Pipeline(str(path))


def test_spaces_and_defaults_are_not_printed() -> None:
    assert str(Pipeline(" double{ times = 4 , eager , lazy=true } , double{} ")) == "double{times=4,eager},double"


def test_a_list_of_passes_and_a_pipeline_are_accepted() -> None:
    assert Pipeline([Double(times=4)]) == Pipeline("double{times=4}") == Pipeline(Pipeline("double{times=4}"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("dubble", "unknown pass 'dubble'; did you mean 'double'? (valid: "),
        ("double{tims=3}", "pass 'double' has no option 'tims'; did you mean 'times'"),
        ("double{times=a}", "option 'times' of 'double' is a whole number, not 'a'"),
        ("double{factor=a}", "option 'factor' of 'double' is a number, not 'a'"),
        ("double{sizes=1|a}", "option 'sizes' of 'double' is a whole number, not 'a'"),
        ("double{eager=maybe}", "option 'eager' of 'double' is true or false, not 'maybe'"),
        ("double{times}", "option 'times' of 'double' needs a value\n  try: double{times=…}"),
        ("double{colour=rad}", "'colour' of 'double' cannot be 'rad'; did you mean 'red'? (valid: pale blue, red)"),
        ("double{times=1,times=2}", "option 'times' is given twice in 'double{times=1,times=2}'"),
        ("double{", "a brace is not closed in 'double{'"),
        ("double}", "a '}' without its '{' in 'double}'"),
        ('double{label="a}', "a quote is not closed"),
        ("double{}x", "text after the closing brace in 'double{}x'"),
        ("double,,double", "an empty item in 'double,,double'"),
        ("", "an empty item in ''"),
        ("double{times=1,}", "an empty item"),
        ("quantize{weights=int9}", "unknown number format 'int9' in 'int9'; did you mean 'int"),
        ("quantize", "pass 'quantize' needs to be told what to quantize"),
        ("quantize{activations=fp8:mse}", "unknown part 'mse' in 'fp8:mse'"),
        ("missing.toml", "no pipeline file missing.toml"),
    ],
)  # fmt: skip
def test_what_a_mistake_says(wrong: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Pipeline(wrong)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[[pass]]\nname = ", "is not TOML"),
        ("", "holds no [[pass]] table"),
        ("[[pass]]\ntimes = 3", "a [[pass]] of {path} has no name"),
        ("[pass]\nname = 'double'", "'pass' in {path} is not a list of tables"),
        ("[[pass]]\nname = 'dubble'", "did you mean 'double'?"),
        ("[[pass]]\nname = 'double'\ntimes = 'x'", "is a whole number, not 'x'"),
    ],
)
def test_what_a_mistake_in_a_file_says(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        Pipeline(path)
    assert message.format(path=path) in str(caught.value)


def test_only_passes_go_into_a_pipeline() -> None:
    with pytest.raises(UserError, match="holds Pass objects, not str"):
        Pipeline(["double"])


def test_a_pass_before_autograd_cannot_follow_one_after_it() -> None:
    with pytest.raises(UserError, match="'double' works before autograd and cannot follow 'joint'") as caught:
        Pipeline("joint,double")
    assert "put 'double' first" in str(caught.value)


def test_a_joint_pass_needs_the_joint_graph() -> None:
    with pytest.raises(UserError, match="works at the joint level") as caught:
        Pipeline("double,joint").run(twice())
    assert 'backend="fuseline"' in str(caught.value)


def test_a_requirement_that_is_not_met_names_the_pass_that_would_meet_it() -> None:
    with pytest.raises(PassError, match="pass 'after' needs doubled") as caught:
        Pipeline("after").run(twice())
    assert "put 'double' before it" in str(caught.value)
    _, report = Pipeline("double,after{allow_empty}").run(twice())
    assert [p.matched for p in report.passes] == [1, 0]


def test_a_pass_that_matches_nothing_is_an_error_unless_that_is_allowed() -> None:
    program = traced(lambda x: x * 3, torch.randn(3))
    with pytest.raises(EmptyPassError) as caught:
        Pipeline("double").run(program)
    text = str(caught.value)
    assert text.startswith("pass 'double' matched no site")
    assert "double{allow_empty}" in text
    assert caught.value.exit_code == 2 and isinstance(caught.value, UserError)
    after, report = Pipeline("double{allow_empty}").run(program)
    assert ops(after) == ["mul"] and report["double"].matched == 0


def test_refused_sites_are_reported_with_their_reason() -> None:
    program = traced(lambda x: (x + x) * (torch.neg(x) + torch.neg(x)), torch.randn(3))
    _, report = Pipeline("double").run(program)
    record = report["double"]
    assert record.matched == 1 and record.refused == {"/add#0": "the operand is an input"}
    assert record.reasons() == [(1, "the operand is an input")]
    with pytest.raises(EmptyPassError, match="refused: 1 x the operand is an input"):
        Pipeline("double").run(traced(lambda x: x + x, torch.randn(3)))


def twice_apart():
    def function(x):
        y, z = torch.neg(x), torch.tanh(x)
        return (y + y) * (z + z)

    return traced(function, torch.randn(3))


@pytest.mark.parametrize("expect", ["0", "2", "Twice:2", "2|Twice:1"])
def test_rewrites_that_are_expected(expect: str) -> None:
    assert Pipeline(f"double{{expect={expect}}}").run(twice_apart())[1]["double"].matched == 2


@pytest.mark.parametrize(
    ("expect", "headline", "detail"),
    [
        ("3", "pass 'double' made 2 rewrites, where 3 are expected", "all rules: 2, expected 3 or more"),
        ("Twice:4", "rule 'Twice' of pass 'double' made 2 rewrites, where 4 are", "Twice: 2, expected 4 or more"),
        ("Twise:1", "rule 'Twise' of pass 'double' made 0 rewrites", "expected 1 or more; did you mean 'Twice'?"),
    ],
)
def test_fewer_rewrites_than_expected(expect: str, headline: str, detail: str) -> None:
    with pytest.raises(ExpectationError, match=headline) as failure:
        Pipeline(f"double{{expect={expect}}}").run(twice_apart())
    assert detail in str(failure.value) and "fuseline why double" in str(failure.value)


def test_an_expectation_that_is_none() -> None:
    with pytest.raises(UserError, match="'expect' is a whole number or RULE:NUMBER, not 'Twice'"):
        Pipeline("double{expect=Twice}")


def test_what_a_search_skips_is_not_expected() -> None:
    pipeline, seen = Pipeline("double{expect=2}"), Limit(1)
    assert pipeline.run(twice_apart(), [seen])[1]["double"].matched == 1
    assert Double(expect=("2",)).relaxed() == Double(allow_empty=True)


def test_the_program_given_is_left_alone() -> None:
    program = twice()
    before = str(program.graph)
    after, report = Pipeline("double").run(program)
    assert str(program.graph) == before and "add" in ops(program)
    assert ops(after) != ops(program) and not program.state and after.state == {"doubled"}
    assert (report["double"].nodes_before, report["double"].nodes_after) == (len(program), len(after))


def test_lossy_passes_are_told_apart() -> None:
    assert [p.name for p in Pipeline("double,lossy,quantize{weights=int8}").lossy] == ["lossy", "quantize"]
    assert not Pipeline().lossy  # what runs unasked is exact


def test_a_pass_that_breaks_is_named() -> None:
    @dataclass(frozen=True)
    class Breaks(Pass):
        name = "breaks"

        def run(self, program, rewriter):
            raise KeyError("lost")

    with pytest.raises(PassError, match="pass 'breaks' failed: KeyError: 'lost'"):
        Pipeline([Breaks()]).run(twice())


def test_a_pass_without_rules_says_so() -> None:
    @dataclass(frozen=True)
    class Hollow(Pass):
        name = "hollow"

    with pytest.raises(FuselineError, match="Hollow has neither rules"):
        Pipeline([Hollow()]).run(twice())


def test_a_report_is_data() -> None:
    import json

    _, report = Pipeline("double").run(twice())
    data = json.loads(json.dumps(report.to_json()))
    assert data["pipeline"] == "double" and data["rewrites"] == 1
    keys = {"name", "tier", "ms", "matched", "refused", "nodes_before", "nodes_after", "error"}
    assert keys <= data["passes"][0].keys()
