"""The wheel and the sdist hold what the sources hold, and work where the sources are not.

They are built from a copy, installed into an environment of its own that sees this one's other packages, and used from
an empty folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import fuseline

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools builds wheels: pip install setuptools"),
]


def sources() -> set[str]:
    skipped = {"__pycache__", ".mypy_cache", ".ruff_cache"}
    found = (p for p in (ROOT / "fuseline").rglob("*") if p.is_file() and not skipped & set(p.parts))
    return {p.relative_to(ROOT).as_posix() for p in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    copy, dist = folder / "sources", folder / "dist"
    shutil.copytree(ROOT / "fuseline", copy / "fuseline", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy)
    dist.mkdir()
    for hook in ("build_sdist", "build_wheel"):
        done = subprocess.run([sys.executable, "-c", BUILD, hook, str(dist)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return dist


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel, which borrows all other packages."""
    target = tmp_path_factory.mktemp("environment")
    (wheel,) = built.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True)
    binaries = target / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / Path(sys.executable).name
    python = python if python.exists() else binaries / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True, env=elsewhere())
    (site,) = target.rglob("site-packages")
    paths = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
    paths |= {p for p in sys.path if p.endswith("site-packages")}
    (site / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return binaries


def elsewhere() -> dict[str, str]:
    """The environment without what leads to these sources."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def call(folder: Path, *command: str) -> str:
    variables = {**elsewhere(), "FUSELINE_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_wheel_holds_the_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == sources()
    information = {name.partition(".dist-info/")[2] for name in names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "licenses/NOTICE"} <= information or {"LICENSE", "NOTICE"} <= information


def test_the_sdist_holds_the_package(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert sources() | {"pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_works_away_from_its_sources(installed: Path, tmp_path: Path) -> None:
    python, program = str(installed / "python"), str(installed / "fuseline")
    where = call(tmp_path, python, "-c", "import fuseline; print(fuseline.__version__, fuseline.__file__)").split()
    assert where[0] == fuseline.__version__ and str(installed.parent) in where[1] and str(ROOT) not in where[1]
    assert "quantize" in call(tmp_path, program, "passes")
    assert "Fuseline works here." in call(tmp_path, program, "doctor")
    report = call(tmp_path, program, "run", "demo:tiny-decoder", "-p", "quantize{weights=int8},fuse", "--tokens", "1")
    assert "linear" in report and "weights" in report
    by_name = "import torch; print(torch.compile(torch.nn.ReLU(), backend='fuseline')(-torch.ones(2)).sum().item())"
    assert float(call(tmp_path, python, "-c", by_name)) == 0
    assert call(tmp_path, python, "-c", "from fuseline import schemas; print(*schemas.names())").split()
    page = "fuseline opt demo:tiny-decoder --dump stages && fuseline view stages -o page.html"
    for command in page.split(" && "):
        call(tmp_path, str(installed / command.split()[0]), *command.split()[1:])
    assert (tmp_path / "page.html").stat().st_size > 10_000
