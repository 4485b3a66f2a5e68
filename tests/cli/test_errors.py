"""The user's mistakes end with exit code 2 and one message, without a traceback."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fuseline.cli import find_ours
from fuseline.compiler.errors import FuselineError, UserError

TINY = "demo:tiny-decoder"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "demo:smolm2"), "unknown demonstration model 'smolm2'; did you mean 'smollm2'?"),
        (("run", "fd:x"), "unknown model source 'fd'"),
        (("run", TINY, "-p", "quantise{weights=int8}"), "unknown pass 'quantise'; did you mean 'quantize'"),
        (("run", TINY, "-p", "quantize{weight=int8}"), "no option 'weight'; did you mean 'weights'"),
        (("run", TINY, "-p", "quantize{weights=int8"), "a brace is not closed"),
        (("run", TINY, "--dtype", "float23"), "unknown dtype 'float23'; did you mean 'float32'"),
        (("run", TINY, "--target", "tritn"), "unknown target 'tritn'; did you mean 'triton'"),
        (("run", TINY, "--verify=ful", "-p", "quantize{weights=int8}"), "unknown verification 'ful'; did you mean"),
        (("passes", "quantise"), "unknown pass 'quantise'; did you mean 'quantize'"),
        (("opt", TINY, "-o", "out.pt"), "try: -o out.pt2"),
        (("opt", TINY, "-o", "/nowhere/out.pt2"), "no such folder: /nowhere"),
        (("kernels", "gguf:/nowhere/x.gguf"), "no such file"),
    ],
)
def test_users_mistakes(cli: Callable, arguments: tuple[str, ...], message: str) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.startswith("error: ")
    assert "Traceback" not in result.err and result.out == ""


@pytest.mark.parametrize("arguments", [("run",), ("rnu",), ("run", TINY, "--tokens", "many"), ("opt",)])
def test_usage_errors(cli: Callable, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.code == 2 and "Usage:" in result.err


def test_a_device_that_is_not_there(cli: Callable) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = cli("run", TINY, "--device", "cuda")
    assert result.code == 2 and "this machine has no GPU" in result.err


def test_debug_shows_the_traceback(cli: Callable) -> None:
    result = cli("run", "demo:smolm2", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err and "error: unknown demonstration model" in result.err


def test_a_fault_of_the_program_is_exit_code_1(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(importlib.import_module("fuseline.cli.run"), "rewrite", broken)
    result = cli("run", TINY, "-p", "quantize{weights=int8}")
    assert result.code == 1
    assert "error: ZeroDivisionError: division by zero" in result.err and "--debug" in result.err
    assert "Traceback" not in result.err


def test_errors_inside_a_backend_are_found() -> None:
    try:
        try:
            raise UserError("the cause")
        except UserError as error:
            raise RuntimeError("wrapped by Dynamo") from error
    except RuntimeError as wrapped:
        found = find_ours(wrapped)
    assert isinstance(found, FuselineError) and found.headline == "the cause"
    assert find_ours(RuntimeError("another")) is None


BRANCHING = """
import torch
from torch import nn

class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1

def make():
    return Branching(), (torch.ones(3),)
"""


def test_a_model_that_cannot_be_captured_names_its_line(
    cli: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "branching_model.py").write_text(BRANCHING)
    result = cli("run", "py:branching_model:make", "-p", "quantize{weights=int8}")
    assert result.code == 2
    assert result.err.startswith("error: Branching cannot be captured as one graph"), "nothing of PyTorch's before it"
    assert "branching_model.py:7: if x.sum() > 0:" in result.err
