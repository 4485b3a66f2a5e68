"""Every command and every Python block of the documentation is run, page by page, in the order of the page.

Commands run in their small form: `demo:smollm2` becomes `demo:tiny-llama`, so that a page takes seconds. With
FUSELINE_DOCS=full they run as they stand (half an hour, and the weights of SmolLM2). What a benchmark does in small is
in tests/benchmarks; here its command line is held to its options. What installs something is held to what there is.
A page that is new is found, not listed: only what is run by another test is named below.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FULL = os.environ.get("FUSELINE_DOCS") == "full"
SMALL = {"demo:smollm2": "demo:tiny-llama", "MODEL": "demo:tiny-llama", "pow_37": "pow_3"}
#: Where another small model is needed: the fault of this page shows only where norms have scales.
SMALL_OF = {"docs/debugging.md": {"demo:smollm2": "demo:tiny-moe"}}
COMMAND = re.compile(r"^(?:\w+=\S+ )*(?:fuseline|python|pytest|pip|make|sed|torchrun|accelerate)\s")
#: Pages whose Python blocks another test runs, by its function.
PYTHON_ELSEWHERE = {
    "README.md": "tests/test_docs.py::test_the_blocks_of_the_readme_run",
    "CONTRIBUTING.md": "tests/test_docs.py::test_the_worked_example_passes_its_own_tests",
    "docs/quantization.md": "tests/test_docs.py::test_the_block_on_adapters_runs",
    "docs/kv-cache.md": "tests/test_docs.py::test_the_block_on_a_cache_of_codes_runs",
    "docs/qat.md": "tests/test_docs.py::test_the_blocks_on_training_run",
    "docs/calibration.md": "tests/cli/test_analyze.py::test_the_page_is_true",
    "docs/tools.md": "tests/test_tools.py::test_example",
    "examples/custom-pass/README.md": "tests/test_custom_pass.py::test_the_commands_of_the_tutorial_run",
}
#: Commands over files that only their reader has, or that another test runs: a part of the command, and that test.
ELSEWHERE = {
    "hf:DIR": "tests/models/test_gptq_awq.py",
    "gguf-codes:FILE": "tests/models/test_gguf_codes.py",
    "my-pass": "tests/cli/test_reduce.py",
    "crash.py": "tests/cli/test_reduce.py",
    "run_on_gpu.py": "tests/cli/test_reduce.py",
    "test_squared_relu.py": "tests/test_docs.py::test_the_worked_example_passes_its_own_tests",
    "fold-layer-scale": "tests/test_custom_pass.py::test_the_commands_of_the_tutorial_run",
    "test_fold_layer_scale.py": "tests/test_custom_pass.py::test_the_commands_of_the_tutorial_run",
    "examples/tools/": "tests/test_tools.py::test_example",
    "python train.py": "tests/compiler/test_traces.py",
    "pytest -m quick": "tests/conftest.py",
    "examples/sequence_parallel.py": "tests/test_examples.py::test_sequence_parallel",
}
#: What a page's Python finds before its first block.
BEFORE = {
    "docs/debugging.md": "import torch\nimport fuseline\nfrom fuseline.models import load\n"
    "loaded = load('demo:tiny-llama')\n"
    "program = fuseline.capture(loaded.model, loaded.example_args, loaded.example_kwargs)\n"
}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[str]:
    """The commands of a page: lines behind `$`, those of bash, and those in text that begin as one does."""
    found = []
    for kind, text in blocks(page):
        if kind not in ("console", "bash", "text"):
            continue
        text = text.replace("\\\n", " ")
        lines = re.findall(r"^\$ (.+)$", text, re.MULTILINE) if kind == "console" else text.splitlines()
        found += [line.strip() for line in lines if COMMAND.match(line.strip()) and " = " not in line]
    return found


def kind_of(command: str) -> str:
    words = [word for word in shlex.split(command, comments=True) if not re.fullmatch(r"\w+=\S*", word)]
    if any(part in command for part in ELSEWHERE):
        return "elsewhere"
    if words[0] in ("pip", "make"):
        return "installs"
    if words[:1] == ["python"] and words[1].startswith("benchmarks/"):
        return "benchmark"
    if words[0] in ("fuseline", "sed"):
        return "run"
    return "unknown"


def environment(folder: Path) -> dict[str, str]:
    """`fuseline` and `python` are this interpreter's; nothing is written to the user's cache."""
    binaries = folder / "bin"
    if not binaries.is_dir():
        binaries.mkdir(parents=True)
        program = binaries / "fuseline"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fuseline "$@"\n')
        program.chmod(0o755)
    path = os.pathsep.join([str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]])
    caches = {} if FULL else {"FUSELINE_CACHE": str(folder / "cache")}
    inherited = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join(filter(None, [str(ROOT), inherited]))
    return {**os.environ, **caches, "PATH": path, "PYTHONPATH": paths, "FUSELINE_REPRO": "off"}


def work_folder(page: Path, folder: Path) -> Path:
    """Where a page's commands run: with the examples, and with its named Python blocks as files."""
    work = folder / "work"
    work.mkdir()
    shutil.copytree(ROOT / "examples", work / "examples")
    for number, text in enumerate(text for kind, text in blocks(page) if kind == "python"):
        named = re.match(r"# (\w+\.py)\n", text)
        (work / (named[1] if named else f"block_{number}.py")).write_text(text, encoding="utf-8")
    return work


def small(command: str, page: Path) -> str:
    if FULL:
        return command.replace("MODEL", SMALL["MODEL"])
    for old, new in (SMALL | SMALL_OF.get(name(page), {})).items():
        command = re.sub(rf"(?<![\w:]){re.escape(old)}(?![\w:])", new, command)
    command = re.sub(r"^((?:\w+=\S+ )*fuseline run \S+)", r"\1 --windows 1", command)
    return re.sub(r"^((?:\w+=\S+ )*fuseline analyze \S+)", r"\1 --windows 4 --length 32", command)


RUN = [page for page in PAGES if any(kind_of(c) == "run" for c in commands(page))]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="commands are those of a shell of Unix")
@pytest.mark.skipif(find_spec("transformers") is None, reason="most pages show a transformers model")
@pytest.mark.parametrize("page", [p for p in RUN if name(p) != "docs/calibration.md"], ids=name)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """Exit code 1 says that something was found: the pages show such commands."""
    work, variables = work_folder(page, tmp_path), environment(tmp_path)
    for command in commands(page):
        if kind_of(command) != "run":
            continue
        again = command.startswith("fuseline analyze") and "--windows" in command
        line = command if again else small(command, page)
        done = subprocess.run(["bash", "-c", line], cwd=work, env=variables, capture_output=True, text=True)
        assert done.returncode in (0, 1), f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, f"{line}\n{done.stderr}"
        assert done.returncode == 0 or done.stdout, f"{line}\n{done.stderr}"


def python_pages() -> list[Path]:
    return [p for p in PAGES if name(p) not in PYTHON_ELSEWHERE and any(kind == "python" for kind, _ in blocks(p))]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="some blocks load a transformers model")
@pytest.mark.parametrize("page", python_pages(), ids=name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    if "compressed_tensors" in page.read_text(encoding="utf-8"):
        pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    work, files = tmp_path / "work", []
    work.mkdir()
    for number, text in enumerate(text for kind, text in blocks(page) if kind == "python"):
        named = re.match(r"# (\w+\.py)\n", text)
        files.append(work / (named[1] if named else f"block_{number}.py"))
        files[-1].write_text(text, encoding="utf-8")
    (work / "before.py").write_text(BEFORE.get(name(page), ""))
    driver = work / "driver.py"
    driver.write_text(
        "import runpy, sys\nsys.path.insert(0, '.')\nfound = runpy.run_path('before.py')\n"
        "for path in sys.argv[1:]:\n"
        "    given = {k: v for k, v in found.items() if k[:2] != '__'}\n"
        "    runpy.run_path(path, init_globals=given, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, str(driver), *map(str, files)],
        cwd=work,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert "False" not in done.stdout.split(), done.stdout


def test_every_command_is_of_a_known_kind() -> None:
    unknown = [f"{name(page)}: {c}" for page in PAGES for c in commands(page) if kind_of(c) == "unknown"]
    assert not unknown


@pytest.mark.parametrize("test", sorted({*PYTHON_ELSEWHERE.values(), *ELSEWHERE.values()}))
def test_what_is_run_elsewhere_is(test: str) -> None:
    file, _, function = test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not function or f"\ndef {function}(" in text


def test_what_installs_names_what_there_is() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in PAGES:
        for command in (c for c in commands(page) if kind_of(c) == "installs"):
            for extras in re.findall(r"\[([\w,]+)\]", command):
                assert set(extras.split(",")) <= set(project["optional-dependencies"]), f"{name(page)}: {command}"
            if command.startswith("make"):
                assert re.search(rf"^{re.escape(command.split()[1])}:", makefile, re.MULTILINE), command


BENCHMARKS = sorted({c for page in PAGES for c in commands(page) if kind_of(c) == "benchmark"})


@cache
def options_of(script: str) -> str:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", BENCHMARKS)
def test_the_options_of_a_benchmark_are_there(command: str) -> None:
    """What it does is tested in small in tests/benchmarks."""
    words = [word for word in shlex.split(command, comments=True) if "=" not in word.partition("/")[0]]
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).is_file()
    shown = options_of(script)
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{re.escape(option)}\b", shown), f"{script} has no {option}"
