"""The documentation is true: its code runs, its commands exist, its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import fuseline
from fuseline.compiler import registry
from fuseline.compiler.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return [text for kind, text in FENCE.findall((ROOT / page).read_text(encoding="utf-8")) if kind == language]


def write_blocks(page: str, folder: Path) -> list[Path]:
    """The page's Python blocks as files: under the name in a first line `# NAME.py`, else `block_N.py`."""
    written = []
    for number, text in enumerate(blocks(page, "python")):
        named = re.match(r"# (\w+\.py)\n", text)
        written.append(folder / (named[1] if named else f"block_{number}.py"))
        written[-1].write_text(text, encoding="utf-8")
    return written


def python(folder: Path, *arguments: str, **environment: str) -> str:
    """What a fresh interpreter prints; the test fails with its errors where it does not succeed."""
    paths = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "FUSELINE_CACHE": str(folder / "cache")}
    variables = {**os.environ, **paths, **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@cache
def generator() -> ModuleType:
    """docs/generate.py, which is a script and no part of a package."""
    spec = spec_from_file_location("fuseline_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_blocks_of_the_readme_run(tmp_path: Path) -> None:
    first, _, third, fourth = write_blocks("README.md", tmp_path)
    driver = tmp_path / "driver.py"
    driver.write_text("import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path, run_name='__main__')\n")
    printed = python(tmp_path, str(driver), *map(str, (first, third, fourth)))
    assert "{'LayerNorm': 1}" in printed  # reports()
    assert "aten.silu.default" in printed and "aten.sigmoid" not in printed  # the pass of one's own


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="the block loads a transformers model")
def test_the_block_of_the_readme_on_a_library_model_runs(tmp_path: Path) -> None:
    _, generates, _, _ = write_blocks("README.md", tmp_path)
    assert "A compiler is" in python(tmp_path, str(generates))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("peft") is None, reason="the block trains adapters: pip install --no-deps peft")
def test_the_block_on_adapters_runs(tmp_path: Path) -> None:
    (block,) = [path for path in write_blocks("docs/quantization.md", tmp_path) if path.name == "adapters.py"]
    assert "torch.Size([1, 32, 512])" in python(
        tmp_path, str(block), PYTHONPATH=os.pathsep.join([str(ROOT), *sys.path])
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="the block loads a transformers model")
def test_the_block_on_a_cache_of_codes_runs(tmp_path: Path) -> None:
    (block,) = write_blocks("docs/kv-cache.md", tmp_path)
    assert re.search(r"torch.Size\(\[1, \d+\]\) \d+", python(tmp_path, str(block)))


@pytest.mark.slow
def test_the_blocks_on_long_contexts_run(tmp_path: Path) -> None:
    """The page quotes what its first block prints."""
    step, pipelines = write_blocks("docs/long_context.md", tmp_path)
    printed = python(tmp_path, str(step)).strip()
    assert f"It prints `{printed}`." in (ROOT / "docs" / "long_context.md").read_text(encoding="utf-8")
    assert python(tmp_path, str(pipelines)).split()[0] == "raise,fuse-loss{chunk=4096},fuse"


@pytest.mark.slow
def test_the_blocks_on_training_run(tmp_path: Path) -> None:
    train, optimizers, distil = write_blocks("docs/qat.md", tmp_path)
    driver = tmp_path / "driver.py"
    driver.write_text("import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path, run_name='__main__')\n")
    loss, difference, *rest = python(tmp_path, str(driver), str(train), str(optimizers), str(distil)).split(maxsplit=2)
    assert float(loss) < 3 and float(difference) < 1e-5
    assert rest == ["torch.Size([2, 32, 64])\nTrue\n"]


def test_a_pass_of_ones_own_takes_twenty_lines() -> None:
    (block,) = [text for text in blocks("README.md", "python") if "fuseline.Pass" in text]
    assert len([line for line in block.splitlines() if line.strip()]) <= 20


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="it runs a kernel in Triton's interpreter")
def test_the_worked_example_passes_its_own_tests(tmp_path: Path) -> None:
    write_blocks("CONTRIBUTING.md", tmp_path)
    (command,) = [
        line for text in blocks("CONTRIBUTING.md", "console") for line in text.splitlines() if line[:1] == "$"
    ]
    setting, *arguments = command.removeprefix("$ ").split()
    assert arguments[0] == "python"
    printed = python(tmp_path, *arguments[1:], **dict([setting.split("=")]))
    assert re.search(r"\b3 passed\b", printed), printed


@pytest.mark.slow
def test_a_package_of_ones_own_offers_its_pass(tmp_path: Path) -> None:
    """The table of pyproject.toml, as pip would record it, and the command line that finds the pass."""
    write_blocks("CONTRIBUTING.md", tmp_path)
    (table,) = (tomllib.loads(text) for text in blocks("CONTRIBUTING.md", "toml"))
    (group,) = table["project"]["entry-points"]
    assert group == registry.GROUP
    installed = tmp_path / "squared_relu-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: squared-relu\nVersion: 1.0\n")
    points = "".join(f"{name} = {value}\n" for name, value in table["project"]["entry-points"][group].items())
    (installed / "entry_points.txt").write_text(f"[{group}]\n{points}")
    page = json.loads(python(tmp_path, "-m", "fuseline", "passes", "squared-relu", "--json", "-"))
    assert page["tier"] == "exact" and page["summary"] == "Say squared_relu(x) where a model writes relu(x)²"


def test_generated_text_is_current(tmp_path: Path) -> None:
    """In a fresh process: other tests register passes of their own in this one."""
    (tmp_path / "check.py").write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'docs')!r})\n"
        "import generate\n"
        "print(*[p.name for p, text in generate.documents().items() if p.read_text(encoding='utf-8') != text])\n"
    )
    stale = python(tmp_path, str(tmp_path / "check.py")).strip()
    assert not stale, f"{stale} is stale: run python docs/generate.py"


def test_slow_blocks_show_what_was_printed() -> None:
    """Each command that the documentation shows output of has some, and `make demo`'s is of the Makefile's pipeline."""
    shown = {
        match["command"]: match["output"]
        for page in PAGES
        for match in generator().BLOCK.finditer(page.read_text(encoding="utf-8"))
    }
    (pipeline,) = re.findall(r"^PIPELINE \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert f'fuseline run demo:smollm2 -p "{pipeline}"' in shown["make demo"]
    for name in registry.available():
        if name in pipeline:
            assert re.search(rf"^{name} +(exact|lossy) +\d+ +\d+ ", shown["make demo"], re.MULTILINE)
    for command, output in shown.items():
        assert output.strip() or command.startswith(("make test", "TRITON_INTERPRET")), f"no output under '{command}'"


def state_table() -> dict[str, tuple[str, str]]:
    """Pass → (tier, state), from the README's table."""
    rows = re.findall(r"^\| `([\w-]+)` \| (exact|lossy) \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {name: (tier, state.strip()) for name, tier, state in rows}


def test_the_state_of_each_pass() -> None:
    table = state_table()
    ours = {name: kind for name, kind in registry.available().items() if kind.__module__.startswith("fuseline.")}
    assert {name for name, (_, state) in table.items() if state.startswith("here")} == set(ours)
    for name, kind in ours.items():
        assert table[name][0] == kind.tier.value
    for name in set(table) - set(ours):
        assert table[name][1] == "planned"
        with pytest.raises(UserError, match=f"unknown pass '{name}'"):
            fuseline.Pipeline(name)


def test_every_verb_and_option_is_documented() -> None:
    from typer.main import get_command

    from fuseline.cli import app

    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for verb, command in get_command(app).commands.items():
        assert f"$ fuseline {verb} --help\n" in text
        for option in command.params:
            assert all(flag in text for flag in option.opts if flag.startswith("-"))


def test_the_pipeline_file_of_the_manual(tmp_path: Path) -> None:
    (text,) = blocks("docs/cli.md", "toml")
    path = tmp_path / "pipeline.toml"
    path.write_text(text)
    (written,) = re.findall(r"the pipeline\n`([^`]+)`:", (ROOT / "docs" / "cli.md").read_text())
    assert fuseline.Pipeline(path) == fuseline.Pipeline(written)
    assert str(fuseline.Pipeline(written)) == written


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_named_in_text_exist(page: Path) -> None:
    """`fuseline/…`, `tests/…`, `docs/…` and `compiler/….py`, wherever a page names one."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for name in re.findall(
        r"`((?:fuseline|tests|docs|examples|benchmarks|compiler|passes|codegen|runtime)/[\w./]*)`", text
    ):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_tests_named_in_text_exist(page: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{page.name} names {file}::{name}"


def test_each_part_of_the_debugger_has_its_test() -> None:
    text = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| [^|]+ \| (.+) \|$", text, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 26))
    assert all(re.search(r"`tests/[\w/]+\.py::test_\w+`", shown) for _, shown in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages_are_plain_and_narrow(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert not re.search(r"[\U0001f300-\U0001faff☀-➿]", prose)
    for line in prose.splitlines():
        assert len(line) <= 120 or line.startswith("|"), line
