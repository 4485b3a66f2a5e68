"""Observers: timing, statistics, stages that run by themselves, and the error of each pass."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pass, Pipeline, Program, UserError
from fuseline.compiler.observe import Dump, Numerics, Statistics, Timing
from fuseline.compiler.observe.numerics import error, promotion
from fuseline.compiler.pattern import call
from fuseline.compiler.stage import execute, render
from fuseline.passes import Raise
from tests.helpers.models import Mlp, Tied, tiny_llama, traced

aten = torch.ops.aten


def mlp(dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp().to(dtype), (torch.randn(4, 8).to(dtype),))


@dataclass(frozen=True)
class Perturb(Pass):
    """Multiplies the result of silu by a factor: an error of known size."""

    name = "perturb"
    factor: float = 1.0

    def run(self, program, rewriter):
        node = next(n for n in program.graph.nodes if n.target is aten.silu.default)
        rewriter.rewrite(
            node, [node], lambda new: new(aten.mul.Tensor, new(aten.silu.default, node.args[0]), self.factor), "scale"
        )


def test_timing_sums_over_programs() -> None:
    timing = Timing()
    for _ in range(2):
        Pipeline("quantize{weights=int8},fuse").run(mlp(), [timing])
    assert timing.programs == 2 and set(timing.ms) == {"quantize", "fuse"}
    assert all(ms > 0 for ms in (*timing.ms.values(), *timing.verify_ms.values()))


def test_statistics_count_rules_and_removed_ops() -> None:
    seen = Statistics()
    _, report = Pipeline("quantize{weights=int8}").run(mlp(), [seen])
    assert seen.rules == {"quantize/linear": 3} and seen.removed == {"aten.linear.default": 3}
    assert [a.site for a in seen.actions] == ["gate/linear#0", "up/linear#0", "down/linear#0"]
    assert report.rewrites == 3


def test_statistics_tell_tries_from_hits_and_refusals() -> None:
    class Doubled(fuseline.Rule):
        def before(self, x):
            return call("silu", x)

        def refuse(self, m):
            return "once is enough" if calls else calls.append(m)

        def after(self, m, new):
            return new(torch.ops.aten.silu.default, m.x)

    class Doubles(fuseline.Pass):
        name = "doubles"

        def rules(self, program):
            yield Doubled()
            yield from Raise().rules(program)

    calls: list[object] = []
    seen = Statistics()
    program = traced(lambda x: torch.nn.functional.silu(x) + torch.nn.functional.silu(-x), torch.randn(3))
    _, report = Pipeline([Doubles()]).run(program, [seen])
    doubled = seen.by_rule["doubles", "Doubled"]
    assert (doubled.tried, doubled.rewritten, doubled.refused) == (2, 1, 1)
    silent = seen.by_rule["doubles", "RMSNorm"]
    assert (silent.tried, silent.rewritten, silent.refused) == (0, 0, 0)
    spent = sum(figures.ms for figures in seen.by_rule.values())
    assert 0 < doubled.ms <= spent <= report["doubles"].ms


def test_rewrites_of_a_pass_without_rules_are_counted() -> None:
    seen = Statistics()
    Pipeline("quantize{weights=int4:g5,allow_empty}").run(mlp(), [seen])
    assert seen.by_rule["quantize", ""].refused == 3 and seen.by_rule["quantize", ""].tried is None


def test_numerics_report_the_error_of_each_pass() -> None:
    _, report = Pipeline([Perturb(), Perturb(factor=1.5)]).run(mlp(), [Numerics()])
    assert report.captured_error is not None and 0 < report.captured_error < 1e-6
    exact, wrong = report.passes
    assert exact.error == pytest.approx(report.captured_error) and wrong.error > 1e-2


def test_numerics_of_a_16_bit_program_are_against_float32() -> None:
    program = mlp(torch.bfloat16)
    assert promotion(program) == {torch.float16: torch.float32, torch.bfloat16: torch.float32}
    _, report = Pipeline([Perturb()]).run(program, [Numerics()])
    assert 1e-4 < report.captured_error < 3e-2  # the rounding of bfloat16 itself
    assert report["perturb"].error == pytest.approx(report.captured_error, rel=0.5)


def test_numerics_promote_the_casts_that_a_model_writes() -> None:
    class Casts(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x.to(torch.float32) * 3, -1).to(torch.bfloat16)

    program = fuseline.capture(Casts(), (torch.randn(4, 64).bfloat16(),))
    _, report = Pipeline("fuse").run(program, [Numerics()])
    assert 1e-4 < report.captured_error < 1e-2  # seen, since the last cast is promoted in the reference


def test_numerics_need_inputs() -> None:
    from dataclasses import replace

    with pytest.raises(UserError, match="numerics need example inputs"):
        Pipeline("fuse").run(replace(mlp(), examples=None), [Numerics()])
    program = mlp()
    _, report = Pipeline("fuse").run(replace(program, examples=None), [Numerics(program.examples)])
    assert report["fuse"].error < 1e-6


@pytest.mark.parametrize(
    ("actual", "reference", "expected"),
    [
        ([1.0, 2.0], [1.0, 4.0], 0.5), ([float("nan")], [1.0], float("inf")), ([float("inf")], [1.0], float("inf")),
        ([float("inf"), 1.0], [float("inf"), 1.0], 0.0), ([float("nan")], [float("nan")], 0.0), ([], [], 0.0),
        ([1e-3], [0.0], 1e-3),
    ],
)  # fmt: skip
def test_error(actual: list[float], reference: list[float], expected: float) -> None:
    assert error(torch.tensor(actual), torch.tensor(reference)) == pytest.approx(expected)


def run_file(path: Path) -> str:
    root = str(Path(fuseline.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_stage_runs_in_a_fresh_process_and_prints_its_error(tmp_path: Path) -> None:
    Pipeline("quantize{weights=int4:g8,activations=int8},fuse").run(mlp(), [Dump(tmp_path)])
    stages = sorted(p.name for p in tmp_path.glob("*.py"))
    assert stages == ["000_captured.py", "001_quantize.py", "002_fuse.py"]
    errors = [float(run_file(tmp_path / name).split("error")[1]) for name in stages]
    assert run_file(tmp_path / stages[0]).startswith("output 0: [4, 8] error 0")
    assert 1e-4 < errors[1] < 0.5 and errors[2] == errors[1]


def test_a_stage_can_be_edited(tmp_path: Path) -> None:
    program = mlp()
    Pipeline("fuse").run(program, [Dump(tmp_path)])
    path = tmp_path / "000_captured.py"
    before = execute(path)
    torch.testing.assert_close(before[0], program.run(program.examples)[0].detach())
    text = path.read_text()
    assert "torch.ops.aten.silu.default" in text
    path.write_text(text.replace("torch.ops.aten.silu.default", "torch.ops.aten.relu.default"))
    assert not torch.allclose(execute(path)[0], before[0])


class Awkward(torch.nn.Module):
    """Names that hold Python's words, an infinite constant, tied parameters, and a keyword that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.true_null = torch.nn.Linear(4, 4)
        self.tied = Tied(12, 4)

    def forward(self, x: torch.Tensor, ids: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        mask = torch.tensor([0.0, float("-inf"), 0.0, 0.0])
        return torch.softmax(self.true_null(x) * scale + mask, -1) + self.tied(ids).sum()


@pytest.mark.slow
def test_awkward_programs_are_dumped_as_they_are(tmp_path: Path) -> None:
    program = fuseline.capture(Awkward(), (torch.randn(2, 4), torch.tensor([1, 2])), {"scale": 0.5})
    Pipeline("quantize{weights=int8}").run(program, [Dump(tmp_path)])
    torch.testing.assert_close(execute(tmp_path / "000_captured.py")[0], program.run(program.examples)[0].detach())
    assert float(run_file(tmp_path / "001_quantize.py").split("error")[1]) < 0.05


def test_constants_and_python_numbers_are_dumped(tmp_path: Path) -> None:
    torch.compiler.reset()
    model = fuseline.optimize(Awkward(), "fuse", observers=[Dump(tmp_path)], dynamic=True)
    with torch.no_grad():
        model(torch.randn(2, 4), torch.tensor([1, 2]), 0.25)
    assert "inf" in (tmp_path / "000_captured.py").read_text()
    assert float(run_file(tmp_path / "001_fuse.py").split("error")[1]) < 1e-6


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(UserError, match="holds files that are not a dump's: thesis.tex") as caught:
        Pipeline("fuse").run(mlp(), [Dump(tmp_path)])
    assert "name a new or empty directory" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_earlier_dump_is_replaced(tmp_path: Path) -> None:
    Pipeline("quantize{weights=int8},fuse").run(mlp(), [Dump(tmp_path)])
    Pipeline("fuse").run(mlp(), [Dump(tmp_path, tensors=False)])
    assert sorted(p.name for p in tmp_path.glob("*")) == ["000_captured.py", "001_fuse.py"]
    with pytest.raises(UserError, match="holds types and no values") as caught:
        execute(tmp_path / "001_fuse.py")
    assert "tensors=True" in str(caught.value)


def test_what_is_written_names_regions_and_comes_from_the_graph() -> None:
    after, _ = Pipeline("fuse").run(mlp())
    text = render(after, "after fuse")
    compile(text, "stage", "exec")  # it is Python
    assert "def linear_0(" in text and "def forward(" in text


def test_a_whole_model_is_dumped(tmp_path: Path) -> None:
    program = fuseline.capture(tiny_llama(num_hidden_layers=1), (torch.tensor([[1, 2, 3]]),), {"use_cache": False})
    Pipeline("quantize{weights=int8},fuse").run(program, [Dump(tmp_path)])
    first, last = execute(tmp_path / "000_captured.py"), execute(tmp_path / "002_fuse.py")
    assert error(last[0], first[0]) < 0.1
