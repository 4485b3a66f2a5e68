"""Every example runs as it stands, in its small form, in an interpreter of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., str]:
    """`run("backend.py", …)`: what the example prints; nothing is written to the user's cache."""

    def call(script: str | Path, *arguments: str, launcher: Sequence[str] = ()) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FUSELINE_CACHE": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, *launcher, str(ROOT / "examples" / script), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return call


def test_each_example_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert EXAMPLES and all(f'run("{name}"' in text for name in EXAMPLES)


@pytest.mark.slow
def test_backend(run: Callable[..., str]) -> None:
    printed = run("backend.py")
    assert re.search(r"^raise +4 sites: \{'RMSNorm': 2, 'SwiGLU': 2\}$", printed, re.MULTILINE), printed
    gap = float(re.search(r"differ by at most (\S+) of", printed)[1])
    assert gap <= 1e-5


@pytest.mark.slow
def test_decorator(run: Callable[..., str]) -> None:
    printed = run("decorator.py")
    assert "'norm.weight', 'norm.bias', 'body.weight'" in printed  # the names that the class gave them
    error = float(re.search(r"quantize\{weights=int8\} error (\S+)", printed)[1])
    assert 0 < error < 0.05


@pytest.mark.slow
def test_buggy_pass(run: Callable[..., str]) -> None:
    printed = run("buggy_pass.py")
    assert re.search(r"^rewrite \d+ of \d+, after \d+ runs: layers\.0\.q/linear#0$", printed, re.MULTILINE), printed
    assert "layers_0_q_weight" in printed


def test_own_pass(run: Callable[..., str]) -> None:
    printed = run("own_pass.py")
    assert "swish: 1 rewritten" in printed and "swish{narrow}: 2 rewritten" in printed
    assert "refused /mul#1: silu rounds torch.bfloat16 once" in printed


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="its model is a transformers model")
def test_quantize_and_generate(run: Callable[..., str]) -> None:
    printed = run("quantize_and_generate.py", "--tokens", "4")
    graphs = re.findall(r"^graph \d .*quantize 14, .*; weights (\S+) → (\S+) MB$", printed, re.MULTILINE)
    assert len(graphs) >= 2, printed  # prefill and decode at least
    assert all(float(after) < 0.5 * float(before) for before, after in graphs)
    original, quantized = re.findall(r"^(?:original |quantized)  '(.*)'$", printed, re.MULTILINE)
    assert original.startswith("A compiler is a program that") and quantized.startswith("A compiler is a program that")


@pytest.mark.slow
def test_observe(run: Callable[..., str], tmp_path: Path) -> None:
    stages = tmp_path / "stages"
    printed = run("observe.py", str(stages))
    errors = {name: float(value) for name, value in re.findall(r"^(\w+) +error (\S+), ", printed, re.MULTILINE)}
    assert errors["raise"] < 1e-5 < errors["quantize"] < 0.1
    assert {path.name for path in stages.glob("*.py")} == {
        "000_captured.py", "001_raise.py", "002_quantize.py", "003_fuse.py"
    }  # fmt: skip
    command = re.search(r"^next: (.+)$", printed, re.MULTILINE)[1].split()
    assert command[0] == sys.executable
    shown = float(re.search(r"error (\S+)", run(command[1]))[1])
    assert shown == pytest.approx(errors["quantize"], rel=0.1)  # against stage 000, which has rounding noise of its own


@pytest.mark.slow
@pytest.mark.distributed
def test_sequence_parallel(run: Callable[..., str]) -> None:
    """Two processes print the losses of one."""
    pytest.importorskip("transformers")
    losses = lambda printed: [float(number) for number in re.findall(r"loss (\S+)", printed)]
    plain = losses(run("sequence_parallel.py", "--plain", "--steps", "3"))
    launched = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    cut = losses(run("sequence_parallel.py", "--steps", "3", launcher=launched))
    assert len(plain) == 3 and cut == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_train_tiny_moe(run: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "weights.safetensors"
    printed = run("train_tiny_moe.py", "--steps", "4", "--batch", "2", "--bytes", "300000", "--out", str(out))
    losses = [float(line.split("held-out loss ")[1].split()[0]) for line in printed.splitlines() if "held-out" in line]
    assert len(losses) == 4 and losses[-1] < losses[0] < 8
    assert "1,022,112 parameters, 2.0 MB in bfloat16" in printed and out.stat().st_size < 2_100_000


@pytest.mark.slow
def test_qat(run: Callable[..., str]) -> None:
    printed = run("qat.py")
    found = re.search(r"loss (\S+) → (\S+); the codes compute what training saw, to (\S+)$", printed, re.M)
    assert found is not None, printed
    first, last, gap = found.groups()
    assert float(last) < 0.5 * float(first) and float(gap) < 1e-4
    before, after = map(int, re.search(r"^weights (\d+) → (\d+) bytes$", printed, re.MULTILINE).groups())
    assert after < before


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="its model is a transformers model")
def test_rsparse(run: Callable[..., str]) -> None:
    printed = run("rsparse.py")
    assert re.search(r"^rsparse: 14 products read 50% of their bytes; the logits are off by \S+$", printed, re.M)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="its model is a transformers model")
def test_compress_and_serve(run: Callable[..., str]) -> None:
    assert "the same tokens: True" in run("compress_and_serve.py")


def test_the_notebook_shows_what_its_cells_print(tmp_path: Path) -> None:
    """Each cell in turn, in one interpreter; no notebook server is needed."""
    book = json.loads((ROOT / "examples" / "first_hour.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    script = tmp_path / "cells.py"
    script.write_text("\nprint('--')\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "FUSELINE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = ["".join("".join(output["text"]) for output in cell["outputs"]) for cell in cells]
    assert done.stdout.split("--\n") == shown
