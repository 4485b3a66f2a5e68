"""Reproducers: a failing pipeline leaves one file, which fails alike in a fresh process, or says why there is none."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import FuselineError, Pass, Pipeline, Program, UserError
from fuseline.compiler.debug import rerun as rerunning
from fuseline.compiler.debug.check import Check, Verdict
from fuseline.compiler.debug.needs import Unimportable, needs
from fuseline.compiler.debug.reduce import failing
from fuseline.compiler.debug.reproducer import (
    alike,
    is_reproducer,
    load_reproducer,
    versions,
    write_reproducer,
)
from fuseline.compiler.debug.rerun import Rerun, rerun
from fuseline.compiler.debug.search import Case
from fuseline.compiler.debug.settle import recipes, settle
from fuseline.compiler.observe import ambient, repro
from fuseline.compiler.observe.ambient import attached
from fuseline.compiler.observe.repro import Repro, reproducing
from fuseline.compiler.stage import Recipe, load_stage, read_table, render, run_stage
from fuseline.compiler.structure import same_structure
from tests.helpers import faulty  # noqa: F401  its passes register themselves
from tests.helpers.models import Mlp

aten = torch.ops.aten


@pytest.fixture
def mlp() -> Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp(), (torch.randn(4, 8),), dynamic={"x": {0: torch.export.Dim.AUTO}})


@pytest.fixture(autouse=True)
def nothing_written_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repro, "_written", {})


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Reproducers are run in this process, and listed: a process for each is what the slow tests do."""
    tried: list[Path] = []

    def rerun_here(path: Path, seconds: float = 0) -> Rerun:
        tried.append(path)
        read = load_reproducer(path)
        with monkeypatch.context() as alone, reproducing(list):
            alone.setattr(ambient, "_attached", [])
            found = Check.parse(read.check)(read.program, read.pipeline)
        status = "reproduces" if alike(found, read.verdict) else "different" if found else "passes"
        return Rerun(status, found.message)

    monkeypatch.setattr(rerunning, "rerun", rerun_here)
    return tried


def fails(pipeline: str | Pipeline, program: Program, folder: Path) -> FuselineError:
    with attached(Repro(folder)), pytest.raises(FuselineError) as raised:
        Pipeline(pipeline).run(program, verification="full")
    return raised.value


def test_what_is_written_reads_back(mlp: Program, tmp_path: Path) -> None:
    path, verdict = tmp_path / "small.py", Verdict("error", 'result 0 is "off" by 1.0e-2 \\', "s0=3")
    pipeline = Pipeline("wrong-scale{at=2},quantize{weights=int4:g8,skip=a.*|b}")
    write_reproducer(path, mlp, pipeline, "error:0.5", verdict, Recipe("random", 1), "local", 4)
    read = load_reproducer(path)
    assert (read.pipeline, read.verdict, read.check) == (pipeline, verdict, "error:0.5")
    assert (read.scope, read.values, read.repeat) == ("local", "random", 4)
    assert read.versions == versions(pipeline) and read.versions["torch"]
    assert is_reproducer(path) and read_table(path)["passes"] == {"wrong-scale": "tests.helpers.faulty:WrongScale"}
    again = tmp_path / "again.py"
    again.write_text(render(mlp, "types", Recipe("random", 1)))
    assert same_structure(read.program, load_stage(again)) or len(read.program) == len(mlp)
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("crash: no node silu_3 at 0x7f", "crash: no node silu_12 at 0x80", True),
        ("crash: shapes [1, 64, 576]", "crash: shapes [2, 2]", True),
        ("verify: float32[1, s0, 128] is float64", "verify: float32[2, 2] is float64", True),
        ("crash: no node silu", "crash: no node relu", False),
        ("crash: boom", "verify: boom", False),
        ("error: result 0 is off by 1.0e-2; 1e-5 is allowed", "error: result 3 is off by inf; 2e-9 is allowed", True),
        ("error: result 0 is off by 1.0e-2; 1e-5 is allowed", "error: 2 results instead of 3", False),
        ("hang: the pipeline is not done after 5 s", "hang: the pipeline is not done after 60 s", True),
    ],
)
def test_which_verdicts_are_of_one_fault(first: str, second: str, same: bool) -> None:
    one, other = (Verdict(kind, message) for kind, _, message in (t.partition(": ") for t in (first, second)))
    assert alike(one, other) is same and alike(one, one)
    assert not alike(Verdict(None), Verdict(None))


def test_a_crash_leaves_the_program_before_its_pass(mlp: Program, tmp_path: Path, here: list[Path]) -> None:
    error = fails("fuse,wrong-scale{at=0,allow_empty},crash-at-add", mlp, tmp_path)
    (path,) = tmp_path.glob("*.py")
    assert error.details[-1] == f"reproducer: {path} (fails alike in a fresh process)" and here == [path]
    assert path.name.startswith("crash-at-add_")
    read = load_reproducer(path)
    assert str(read.pipeline) == "crash-at-add" and (read.scope, read.values) == ("local", "none")
    before, _ = Pipeline("fuse").run(mlp)
    assert [n.name for n in read.program.graph.nodes] == [n.name for n in before.graph.nodes]  # not half rewritten


def test_a_broken_graph_leaves_one_too(mlp: Program, tmp_path: Path, here: list[Path]) -> None:
    error = fails("wrong-meta", mlp, tmp_path)
    (path,) = tmp_path.glob("*.py")
    assert load_reproducer(path).verdict.kind == "verify" and str(path) in str(error)


def test_a_second_failure_of_the_kind_is_proved_once(mlp: Program, tmp_path: Path, here: list[Path]) -> None:
    first, second = (fails("crash-at-add", mlp, tmp_path) for _ in range(2))
    assert first.details[-1] == second.details[-1] and len(here) == 1


def test_the_whole_pipeline_where_a_pass_alone_does_not_fail(mlp: Program, tmp_path: Path, here: list[Path]) -> None:
    """A value whose recorded type is wrong does not outlive being written to a file."""
    with attached(Repro(tmp_path)), pytest.raises(FuselineError) as raised:
        Pipeline("wrong-meta,half-seen").run(mlp, verification="off")
    (path,) = tmp_path.glob("*.py")
    read = load_reproducer(path)
    assert (read.scope, str(read.pipeline)) == ("global", "wrong-meta,half-seen") and str(path) in str(raised.value)
    assert len(here) > 1


@dataclass(frozen=True)
class OnlyHere(Pass):
    """Fails in this process alone."""

    name = "only-here"

    def run(self, program, rewriter):
        node = next(n for n in program.graph.nodes if n.op == "call_function")
        if BROKEN:
            raise ValueError("something of this process")
        rewriter.rewrite(node, [node], lambda new: new(node.target, *node.args), "copy")


BROKEN = True


def test_what_does_not_fail_again_is_not_told(
    mlp: Program, tmp_path: Path, here: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = rerunning.rerun

    def mended(path: Path, seconds: float = 0) -> Rerun:
        monkeypatch.setattr(sys.modules[__name__], "BROKEN", False)
        return known(path)

    monkeypatch.setattr(rerunning, "rerun", mended)
    error = fails(Pipeline([OnlyHere()]), mlp, tmp_path)
    assert error.details[-1].startswith("reproducer: none that fails alike in a fresh process")
    assert not list(tmp_path.iterdir()) and here


def test_mistakes_of_the_user_leave_none(mlp: Program, tmp_path: Path, here: list[Path]) -> None:
    error = fails("quantize{weights=int4:g5}", mlp, tmp_path)  # 5 divides no width
    assert isinstance(error, UserError) and not list(tmp_path.iterdir()) and not here


def test_the_first_error_is_what_one_hears_of(mlp: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Rerun:
        raise RuntimeError("no more processes")

    monkeypatch.setattr(rerunning, "rerun", broken)
    error = fails("crash-at-add", mlp, tmp_path)
    assert "no such sum" in error.headline and error.details[-1] == "reproducer: none: RuntimeError: no more processes"


def test_a_folder_that_cannot_be_written(mlp: Program, tmp_path: Path, here: list[Path]) -> None:
    (tmp_path / "file").write_text("")
    error = fails("crash-at-add", mlp, tmp_path / "file" / "folder")
    assert "reproducer: none" in error.details[-1] and not here


def test_the_environment_decides(mlp: Program, tmp_path: Path, here: list[Path], monkeypatch) -> None:
    for value, count in (("off", 0), ("", 0), (str(tmp_path), 1)):
        monkeypatch.setenv("FUSELINE_REPRO", value)
        with reproducing(list), pytest.raises(FuselineError):  # a tool that runs what fails on purpose
            Pipeline("crash-at-add").run(mlp)
        assert not list(tmp_path.iterdir())
        with pytest.raises(FuselineError):
            Pipeline("crash-at-add").run(mlp)
        assert len(list(tmp_path.glob("*.py"))) == count


def test_the_fewest_values_that_do(mlp: Program, tmp_path: Path) -> None:
    path, case = tmp_path / "small.py", Case(mlp, Pipeline("wrong-scale"))
    check = Check.parse("error")
    verdict = failing(check, case, None)
    kinds = lambda **options: [r.kind for r in recipes(case, verdict, path, **options)]
    assert kinds() == ["random", "random", "random", "embedded"] and kinds(values="real") == ["embedded"]
    assert settle(path, case, check, verdict, "global").kind == "random"
    assert settle(path, case, check, verdict, "global", values="real").kind == "embedded"
    assert settle(path, case, check, verdict, "global", values="none") is None and not path.exists()
    with pytest.raises(UserError, match="values cannot be 'rael'; did you mean 'real'"):
        kinds(values="rael")


@dataclass(frozen=True)
class OnlyRealValues(Pass):
    """Wrong where a weight is larger than random ones are."""

    name = "only-real-values"

    def run(self, program, rewriter):
        node = next(n for n in program.graph.nodes if n.target is aten.silu.default)
        wrong = any(s.tensor.abs().max() > 9e4 for s in program.sources.values())
        again = lambda new: new(aten.mul.Tensor, new(node.target, *node.args), 2.0 if wrong else 1.0)
        rewriter.rewrite(node, [node], again, "values")


def test_real_values_where_random_ones_do_not_show_it(tmp_path: Path) -> None:
    model = Mlp(32, 64)
    with torch.no_grad():
        model.up.weight[0, 0] = 1e5
    case = Case(fuseline.capture(model, (torch.randn(4, 32),)), Pipeline([OnlyRealValues()]))
    check, path = Check.parse("error"), tmp_path / "values.py"
    assert settle(path, case, check, failing(check, case, None), "global").kind == "embedded"


def test_large_values_lie_beside_the_file(tmp_path: Path) -> None:
    program = fuseline.capture(
        torch.nn.Sequential(torch.nn.Linear(1100, 1000), torch.nn.SiLU()), (torch.randn(2, 1100),)
    )
    case, path = Case(program, Pipeline("wrong-scale")), tmp_path / "large.py"
    verdict = failing(Check.parse("error"), case, None)
    assert settle(path, case, Check.parse("error"), verdict, "global", values="real").kind == "file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.py", "large.safetensors"]
    assert torch.equal(load_reproducer(path).program.examples[0], program.examples[0])


def test_passes_that_no_other_process_has(mlp: Program) -> None:
    @dataclass(frozen=True)
    class Local(Pass):
        name = "local"

    with pytest.raises(Unimportable, match="the pass 'local' is defined inside a function") as raised:
        needs(Pipeline([Local()]), mlp)
    assert "define Local at the top of a module" in str(raised.value)


SCRIPT = """
from dataclasses import dataclass
from fuseline import Pass, Pipeline
from fuseline.compiler.debug.needs import needs
import torch
from fuseline import Program

@dataclass(frozen=True)
class Mine(Pass):
    name = "mine"

program = Program.from_fx(torch.fx.symbolic_trace(torch.nn.ReLU()), (torch.ones(1),))
{work}
"""


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [True, False])
def test_a_pass_of_the_script_that_runs(tmp_path: Path, guarded: bool) -> None:
    import subprocess

    call = "print(needs(Pipeline([Mine()]), program)['passes'])"
    work = f'if __name__ == "__main__":\n    {call}' if guarded else call
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(work=work))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    if guarded:
        assert f"{{'mine': '{script.resolve()}:Mine'}}" in done.stdout, done.stderr
    else:
        assert "the pass 'mine' is defined in the program that runs" in done.stderr
        assert "move Mine to a module, or put what the script does under: if __name__ == '__main__'" in done.stderr


def test_files_that_are_none(mlp: Program, tmp_path: Path) -> None:
    path = tmp_path / "stage.py"
    path.write_text(render(mlp, "a stage"))
    with pytest.raises(UserError, match="is a stage, and says of no pipeline that it fails"):
        load_reproducer(path)
    write_reproducer(path, mlp, Pipeline("wrong-scale"), "error", Verdict("error", "x"), Recipe())
    path.write_text(path.read_text().replace("tests.helpers.faulty:WrongScale", "tests.helpers.gone:WrongScales"))
    with pytest.raises(UserError, match="needs the pass 'wrong-scale' of tests.helpers.gone, which cannot be imported"):
        load_reproducer(path)
    with pytest.raises(UserError, match="holds types and no values\n  try: fuseline repro"):
        run_stage(path)


def test_one_in_a_fresh_process(mlp: Program, tmp_path: Path) -> None:
    """The real thing: written when a pass fails, run by another Python."""
    error = fails("crash-at-add", mlp, tmp_path)
    (path,) = tmp_path.glob("*.py")
    assert error.details[-1] == f"reproducer: {path} (fails alike in a fresh process)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        (("no such sum", "no such product"), "different", ""),  # what was recorded is another fault
        (("'pipeline': 'crash-at-add'", "'pipeline': 'fuse{allow_empty}'"), "passes", ""),
        (("STAGE = {", "STAGES = {"), "unusable", "it has no STAGE"),
        (("'check': 'crash'", "'check': 'crush'"), "unusable", "unknown check 'crush'"),
    ],
)
def test_what_a_fresh_process_says(mlp: Program, tmp_path: Path, change, status: str, reason: str) -> None:
    path = tmp_path / "case.py"
    check, pipeline = Check.parse("crash"), Pipeline("crash-at-add")
    write_reproducer(path, mlp, pipeline, "crash", check(mlp, pipeline), Recipe())
    path.write_text(path.read_text().replace(*change))
    again = rerun(path)
    assert again.status == status and reason in again.reason


@pytest.mark.slow
def test_a_failing_compile_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSELINE_REPRO", str(tmp_path))
    torch._dynamo.reset()
    model = torch.compile(Mlp(), backend="fuseline", options={"pipeline": "crash-at-add"})
    with torch.no_grad(), pytest.raises(Exception, match="no such sum") as raised:
        model(torch.randn(4, 8))
    (path,) = tmp_path.glob("*.py")
    assert f"reproducer: {path} (fails alike in a fresh process)" in str(raised.value)
    assert rerun(path).reproduced


@pytest.mark.slow
def test_code_that_cannot_be_generated_names_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torch.compile, for a target that this machine has only by name: it fails before Triton is asked."""
    monkeypatch.setenv("FUSELINE_REPRO", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch._dynamo.reset()
    options = {"pipeline": "wrong-kernel{written=false},fuse", "target": "triton"}
    with torch.no_grad(), pytest.raises(Exception, match="no expression for this op") as raised:
        torch.compile(Mlp(), backend="fuseline", options=options)(torch.randn(4, 8))
    (path,) = tmp_path.glob("*.py")
    assert f"reproducer: {path} (fails alike in a fresh process)" in str(raised.value)
