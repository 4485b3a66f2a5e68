"""Passes of other packages: installed, found by their entry point, run by name; broken ones are named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pass, UserError
from fuseline.compiler import registry
from tests.helpers.models import registered

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "somebody-elses-passes"
version = "1.0"

[project.entry-points."fuseline.passes"]
halve-twice = "somebody_elses_passes:HalveTwice"

[tool.setuptools]
py-modules = ["somebody_elses_passes"]
"""
MODULE = '''
"""Fold two halvings into one: `halve-twice`."""

from dataclasses import dataclass

import torch

from fuseline import Pass, Rule


class Halvings(Rule):
    def before(self, x):
        return (x * 0.5) * 0.5

    def after(self, m, new):
        return new(torch.ops.aten.mul.Tensor, m.x, 0.25)


@dataclass(frozen=True)
class HalveTwice(Pass):
    name = "halve-twice"

    def rules(self, program):
        yield Halvings()


class Quarter(torch.nn.Module):
    def forward(self, x):
        return (x * 0.5) * 0.5


def model():
    return Quarter(), (torch.ones(3),)
'''
RUN = """
import torch, fuseline
program = fuseline.Program.from_fx(torch.fx.symbolic_trace(lambda x: (x * 0.5) * 0.5), (torch.ones(3),))
after, report = fuseline.Pipeline("halve-twice").run(program)
print(report["halve-twice"].matched, after.to_module()(torch.ones(3)).tolist())
fuseline.Pipeline("halve-twise")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine on which somebody else's package is installed."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "somebody_elses_passes.py").write_text(MODULE)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index",
               "--disable-pip-version-check", "--target", str(target), str(source)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    root = str(Path(fuseline.__file__).parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), root])}


def python(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_a_pass_of_another_package_runs_by_its_name(installed: dict[str, str]) -> None:
    done = python(installed, "-c", RUN)
    assert done.stdout.split("\n")[0] == "1 [0.25, 0.25, 0.25]", done.stderr
    assert "unknown pass 'halve-twise'; did you mean 'halve-twice'" in done.stderr


@pytest.mark.slow
def test_the_command_line_lists_it(installed: dict[str, str], tmp_path: Path) -> None:
    done = python(installed, "-m", "fuseline", "passes", "--json", str(tmp_path / "passes.json"))
    assert done.returncode == 0, done.stderr
    assert "halve-twice" in done.stdout
    assert "halve-twice" in json.dumps(json.loads((tmp_path / "passes.json").read_text()))


@pytest.mark.slow
def test_the_command_line_runs_it_on_a_model(installed: dict[str, str], tmp_path: Path) -> None:
    done = python(
        installed, "-m", "fuseline", "opt", "py:somebody_elses_passes:model", "-p", "halve-twice",
        "-o", str(tmp_path / "out.pt2"), "--json", str(tmp_path / "report.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "report.json").read_text())["passes"]
    assert (record["name"], record["matched"]) == ("halve-twice", 1)
    rewritten = torch.export.load(tmp_path / "out.pt2")
    assert rewritten.module()(torch.ones(3)).tolist() == [0.25, 0.25, 0.25]


def entry_point(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    point = EntryPoint("strange", value, registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.setattr(registry, "_loaded_entry_points", False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no_such_module_at_all:Pass", "the pass 'strange' of package '?' cannot be loaded"),
        ("json:loads", "the entry point 'strange' (json:loads) is not a fuseline.Pass"),
    ],
)
def test_a_broken_package_is_named_at_every_call(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    entry_point(monkeypatch, value)
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            fuseline.Pipeline("fuse")
        assert message in str(caught.value)


def test_two_passes_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class First(Pass):
        name = "same"

    @dataclass(frozen=True)
    class Second(Pass):
        name = "same"

    with registered(First), pytest.raises(ValueError, match="two passes are called 'same'"):
        fuseline.register(Second)
    with pytest.raises(ValueError, match="has no name"):
        fuseline.register(type("Nameless", (Pass,), {}))


PASS = """
import fuseline

@fuseline.register
class Nothing(fuseline.Pass):
    name = "nothing-at-all"
"""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("named", ["{folder}/my_pass.py", "my_pass"])
def test_a_pass_of_a_file_or_a_module_is_named_by_the_environment(tmp_path: Path, named: str) -> None:
    (tmp_path / "my_pass.py").write_text(PASS)
    root = Path(fuseline.__file__).parents[1]
    settings = {"FUSELINE_PASSES": named.format(folder=tmp_path), "PYTHONPATH": f"{root}{os.pathsep}{tmp_path}"}
    run = lambda **more: subprocess.run(
        [sys.executable, "-c", "import fuseline; print(fuseline.Pipeline('nothing-at-all'))"],
        env={**os.environ, **settings, **more},
        capture_output=True,
        text=True,
    )
    assert run().stdout.strip() == "nothing-at-all"
    wrong = run(FUSELINE_PASSES="absent.py")
    assert "FUSELINE_PASSES names 'absent.py', which cannot be imported" in wrong.stderr
