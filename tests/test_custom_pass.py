"""examples/custom-pass: the tutorial is the package's text, and the package, installed, works from the command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "examples" / "custom-pass"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TEXT = (PACKAGE / "README.md").read_text(encoding="utf-8")
FILES = ("fold_layer_scale.py", "test_fold_layer_scale.py", "pyproject.toml", "model.py")


def test_the_tutorial_is_the_package() -> None:
    shown = [text for kind, text in FENCE.findall(TEXT) if kind in ("python", "toml")]
    assert shown == [(PACKAGE / name).read_text(encoding="utf-8") for name in FILES]


def test_it_takes_less_than_a_hundred_lines() -> None:
    assert sum(len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in FILES[:3]) <= 110
    assert sum(bool(line.strip()) for name in FILES for line in (PACKAGE / name).open(encoding="utf-8")) < 100


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder that pip installed the package into, and a copy of its sources to run the commands in."""
    if find_spec("setuptools") is None or find_spec("pip") is None:
        pytest.skip("pip and setuptools install the package")
    target, work = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("work") / "custom-pass"
    shutil.copytree(PACKAGE, work, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(target), str(work)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target, work


def run(installed: tuple[Path, Path], *command: str) -> str:
    target, work = installed
    (work / "fold_layer_scale.py").unlink(missing_ok=True)  # what runs is what was installed
    variables = {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{ROOT}", "FUSELINE_CACHE": str(work / "cache")}
    done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_the_commands_of_the_tutorial_run(installed: tuple[Path, Path]) -> None:
    (commands,) = [text for kind, text in FENCE.findall(TEXT) if kind == "text"]
    install, enter, *rest = commands.splitlines()
    assert install == "pip install ./examples/custom-pass" and enter == "cd examples/custom-pass"
    tests, page, opt, why = (shlex.split(line) for line in rest)
    assert re.search(r"\b4 passed\b", run(installed, sys.executable, *tests[1:]))
    fuseline = (sys.executable, "-m", "fuseline")
    assert "Fold the scale behind a linear into its weight" in run(installed, *fuseline, *page[1:])
    assert re.search(r"^fold-layer-scale +exact +2 +0 ", run(installed, *fuseline, *opt[1:]), re.MULTILINE)
    assert "fold-layer-scale/Folded" in run(installed, *fuseline, *why[1:])


@pytest.mark.slow
def test_it_runs_by_name_beside_the_passes_of_the_package(installed: tuple[Path, Path]) -> None:
    command = (
        sys.executable,
        "-m",
        "fuseline",
        "opt",
        "py:model.py:make",
        "-p",
        "fold-layer-scale,fuse",
        "--json",
        "-",
    )
    data = json.loads(run(installed, *command))
    assert [(step["name"], step["matched"]) for step in data["passes"]][0] == ("fold-layer-scale", 2)
    assert all(step["error"] <= 1e-5 for step in data["passes"])
    listed = json.loads(run(installed, sys.executable, "-m", "fuseline", "passes", "--json", "-"))
    assert {"raise", "fold-layer-scale"} <= {step["name"] for step in listed["passes"]}
