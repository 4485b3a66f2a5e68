"""Identities: they change with a pass's code and options and with nothing else; what is kept says whose work it is."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fuseline
from fuseline import Pass, Pipeline, Rule
from fuseline.codegen.lower import lower
from fuseline.compiler.debug.reproducer import versions
from fuseline.compiler.identity import _of_module, code_digest, identity
from fuseline.compiler.importing import import_file
from fuseline.compiler.pattern import call
from fuseline.compiler.plan import Plan
from fuseline.passes import Fuse, Quantize, Raise
from tests.helpers.models import traced

PASS = """
import torch
from dataclasses import dataclass
from fuseline import Pass, Rule
from fuseline.compiler.pattern import call
{imports}

class Scaled(Rule):
    def before(self, x):
        return call("silu", x)

    def after(self, m, new):
        return new(torch.ops.aten.mul.Tensor, new(torch.ops.aten.silu.default, m.x), {factor})

@dataclass(frozen=True)
class Scales(Pass):
    name = "scales"
    times: int = 1

    def rules(self, program):
        yield Scaled()
"""


def scales(folder: Path, factor: str = "2.0", imports: str = "") -> type[Pass]:
    """The pass, as a file says it now."""
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(PASS.format(factor=factor, imports=imports))
    _of_module.cache_clear()
    return import_file(folder / "own.py", "own").Scales


def test_code_and_options_make_the_identity(tmp_path: Path) -> None:
    first = scales(tmp_path / "a")()
    assert identity(first) == identity(scales(tmp_path / "b")()), "wherever the file lies"
    assert identity(first) != identity(scales(tmp_path / "c", "3.0")())
    kind = scales(tmp_path / "d")
    assert identity(kind()) != identity(kind(times=2)) and identity(kind()) == identity(kind(times=1))


def test_what_it_imports_from_its_own_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "kit"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "deep.py").write_text("WIDTH = 2.0\n")
    (package / "helper.py").write_text("from . import deep\n")
    (package / "other.py").write_text("OTHER = 1\n")
    (package / "own.py").write_text(PASS.format(factor="2.0", imports="from .helper import deep"))

    def now() -> str | None:
        _of_module.cache_clear()
        from kit.own import Scales

        return code_digest(Scales)

    before = now()
    (package / "other.py").write_text("OTHER = 2\n")
    assert now() == before, "it imports nothing of that"
    (package / "deep.py").write_text("WIDTH = 3.0\n")
    assert now() != before, "its helper's helper"


def test_every_process_gives_the_same_one() -> None:
    ours = [Raise(), Quantize(weights="int8"), Fuse()]
    script = "from fuseline.passes import *; from fuseline.compiler.identity import identity\n"
    script += "print(*map(identity, [Raise(), Quantize(weights='int8'), Fuse()]))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert printed == [identity(step) for step in ours] and len({*printed}) == 3


def test_a_pass_in_no_file_has_none() -> None:
    kind = type("Typed", (Raise,), {"__module__": "nowhere"})
    assert identity(kind()) is None


def test_what_a_pass_made_is_stored_by_its_content(tmp_path: Path) -> None:
    """Two passes of one name and equal options differ in code: neither gets the other's module, whatever the order."""

    def module(factor: str) -> Path:
        program = traced(lambda x: torch.nn.functional.silu(x) + 1, torch.randn(8, 8))
        after, _ = Pipeline([scales(tmp_path / "own", factor)(), Fuse()]).run(program)
        return lower(after).write(tmp_path)

    two, three, again = module("2.0"), module("3.0"), module("2.0")
    assert two == again != three and "3.0" in three.read_text() and "3.0" not in two.read_text()


def test_a_reproducer_tells_that_its_pass_has_changed(tmp_path: Path) -> None:
    before = versions(Pipeline([scales(tmp_path)()]))
    after = versions(Pipeline([scales(tmp_path, "3.0")()]))
    assert [name for name in before if before[name] != after[name]] == ["pass scales"]


class Bounded(Rule):
    def before(self, x):
        return call("silu", x)

    def after(self, m, new):
        return new(torch.ops.aten.relu.default, m.x)


class Bounds(Pass):
    """Decides from data, as far as a plan can tell."""

    name, needs_data = "bounds", True

    def analyze(self, program, data):
        return {}

    def rules(self, program):
        yield Bounded()


def test_a_plan_of_other_code_warns(tmp_path: Path) -> None:
    program = fuseline.capture(torch.nn.SiLU(), (torch.randn(3),))
    pipeline = Pipeline([Bounds()])
    path = pipeline.analyze(program, [program.examples]).save(tmp_path / "plan.json")
    assert Plan.load(path).passes == {"bounds": identity(Bounds())}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.run(program, plan=Plan.load(path))
    path.write_text(path.read_text().replace(str(identity(Bounds())), "0" * 12))
    with pytest.warns(UserWarning, match="decisions for 'bounds' were made by other code .* analyse again"):
        pipeline.run(program, plan=Plan.load(path))
    stored = path.read_text().replace('"passes"', '"unknown"')  # one written before passes were told apart
    path.write_text(stored)
    pipeline.run(program, plan=Plan.load(path))
