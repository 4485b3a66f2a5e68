"""On a machine that lacks something, verbs say so in one line and go on in eager."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable

import pytest
import torch

from fuseline.cli import environment
from fuseline.cli.output import finite
from fuseline.cli.render import number, shorten_ops

QUANTIZE = "quantize{weights=int8}"


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides a package from whoever looks whether it is installed."""

    def hide(package: str) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
        )

    return hide


def test_without_triton(cli: Callable, without: Callable[[str], None]) -> None:
    without("triton")
    result = cli("run", "demo:tiny-decoder", "-p", QUANTIZE, "--windows", "1", "--tokens", "1", "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert "triton is not installed: no kernels are compiled, everything runs in eager" in data["notes"]
    assert data["target"] == "eager" and all(kernel["targets"] == {} for kernel in data["kernels"])
    assert "triton is not installed" in result.err


def test_without_transformers(cli: Callable, without: Callable[[str], None]) -> None:
    without("transformers")
    result = cli("run", "demo:tiny-decoder", "-p", QUANTIZE, "--windows", "0", "--tokens", "0", "--json", "-")
    assert result.code == 0, result.err
    assert any(note.startswith("transformers is not installed") for note in json.loads(result.out)["notes"])
    result = cli("run", "demo:tiny-llama", "-p", QUANTIZE)
    assert result.code == 2
    assert "demo:tiny-llama needs the package 'transformers'" in result.err
    assert "pip install 'fuseline[hf]'" in result.err


def test_without_a_compiler_inductor_becomes_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    target, notes = environment.choose_target("inductor", "cpu")
    assert target == "eager"
    assert "no C++ compiler here, which target inductor needs: running in eager" in notes


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    target, notes = environment.choose_target("triton", "cpu")
    assert target == "eager"
    assert "target triton needs --device cuda: running in eager" in notes
    assert environment.choose_target(None, "cpu")[0] == "eager"


def test_with_a_gpu_the_target_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(environment, "has", lambda package: True)
    assert environment.choose_target(None, "cuda") == ("triton", [])
    assert environment.choose_target("inductor", "cuda") == ("inductor", [])


@pytest.mark.parametrize(
    ("value", "text"), [(3.14e-7, "3.1e-7"), (0.0, "0"), (None, "-"), (float("inf"), "inf"), (12.0, "1.2e1")]
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_json_has_no_nan() -> None:
    assert json.loads(json.dumps(finite({"a": [float("nan"), 1.0], "b": float("-inf")}), allow_nan=False)) == {
        "a": ["nan", 1.0],
        "b": "-inf",
    }


def test_ops_are_counted() -> None:
    assert shorten_ops(["aten.mul.Tensor", "fuseline.rms_norm.default", "aten.mul.Tensor"]) == "2 mul, rms_norm"
