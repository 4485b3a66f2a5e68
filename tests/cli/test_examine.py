"""`fuseline examine`: exit codes, JSON, the report, and help for the user's mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.usefixtures("only_own_passes")

TINY = "demo:tiny-decoder"
MODELS = """
import torch
from torch import nn


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        h = self.first(x)
        print("mean", h.shape)
        return self.second(h) * h.sum().item()


class Never(Breaks):
    def forward(self, x):
        for _ in range(2):
            print("again")
            x = self.second(self.first(x))
        return x


def breaks():
    return Breaks(), (torch.randn(4, 16),)


def never():
    return Never(), (torch.randn(4, 16),)


def alone():
    return Breaks()


def wrong():
    return Breaks(), (torch.randn(4, 16), 2)
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    return path


def test_a_model_that_is_fine(cli: Callable) -> None:
    result = cli("examine", TINY, "--json", "-")
    data = json.loads(result.out)
    assert result.code == 0 and data["ok"] and data["findings"] == [] and data["breaks"] == []
    (graph,) = data["graphs"]
    assert [p["name"] for p in graph["passes"]] == ["raise", "fuse-loss", "fuse"]
    (ids,) = graph["inputs"]
    assert (ids["name"], ids["dtype"], ids["mutated"]) == ("ids", "int64", False)
    assert ids["shape"][0] == 1 and ids["shape"][1].startswith("s")  # the length is a symbol
    taken = graph["passes"][0]["taken"]
    norms = [t for t in taken if t["rule"] == "RMSNorm"]
    assert len(norms) == 5 and all("decoder.py:" in t["lines"][-1] for t in norms)
    assert data["parameters"] == {"float32": {"count": 21, "bytes": 2099712}}
    lines = result.err.splitlines()
    assert lines[0] == f"{TINY}: 1 graph, {graph['nodes']} nodes, 21 float32 parameters (2.1 MB)"
    assert max(map(len, lines)) <= 80
    assert lines[-1].startswith(f"next: fuseline run {TINY}")


@pytest.mark.slow
def test_a_pipeline_of_ones_own(cli: Callable) -> None:
    result = cli("examine", TINY, "-p", "raise,quantize{weights=int4:g64},fuse", "--json", "-")
    (graph,) = json.loads(result.out)["graphs"]
    assert result.code == 0
    assert graph["weights_after"] < graph["weights_before"]
    assert {one["name"] for one in graph["whole"]} == {"embed.weight", "head.weight"}
    assert "refused 1: the model's head over its vocabulary" in result.err
    assert "embed.weight stays 0.3 MB: no pass takes it" in result.err


def test_graph_breaks_with_their_remedies(cli: Callable, models: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    result = cli("examine", f"py:{models}:breaks", "--report", str(report), "--json", "-")
    data = json.loads(result.out)  # what the model prints goes elsewhere
    assert result.code == 1 and not data["ok"] and "mean torch.Size" in result.err
    assert [(b["kind"], b["code"]) for b in data["breaks"]] == [
        ("printing", 'print("mean", h.shape)'),
        ("tensor to Python number", "return self.second(h) * h.sum().item()"),
    ]
    line = 1 + MODELS.splitlines().index('        print("mean", h.shape)')
    assert f'   at {models}:{line}\n      print("mean", h.shape)\n   try: print behind' in result.err
    assert report.read_text().startswith(f"# py:{models}:breaks: 3 graphs, 2 to look at\n")
    assert data["report"] == str(report)


def test_a_model_that_cannot_be_captured(cli: Callable, models: Path) -> None:
    result = cli("examine", f"py:{models}:never")
    assert result.code == 1
    assert "1. no graph was captured: the whole forward runs in Python" in result.out
    assert (
        "; forward runs in Python as a whole" in " ".join(result.out.split()) and "   try: print behind" in result.out
    )
    assert f"fuseline examine py:{models}:never --report report.md" in result.out.splitlines()[-1]


def test_an_exported_program(cli: Callable, tmp_path: Path) -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU()).eval()
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(model, (torch.randn(4, 16),)), path)
    result = cli("examine", str(path))
    assert result.code == 0 and "raise: 1 LayerNorm" in result.out
    assert "numbers for good, by the weights or the code: input_1.shape[0] = 4" in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("py:{models}:alone",), "returned a Breaks without example inputs\n  try: let alone() return (model, (ex"),
        (("py:{models}:wrong",), "Breaks.forward() cannot be called with these arguments: too many positional"),
        ((TINY, "-p", "rais"), "unknown pass 'rais'; did you mean 'raise'"),
        (("demo:tiny-decode",), "did you mean 'tiny-decoder'"),
        ((TINY, "--report", "/nowhere/report.md"), "no such folder: /nowhere"),
    ],
)
def test_users_mistakes(cli: Callable, models: Path, arguments: tuple[str, ...], message: str) -> None:
    result = cli("examine", *(a.format(models=models) for a in arguments))
    assert result.code == 2 and message in result.err and "Traceback" not in result.err and result.out == ""


def test_a_pass_that_finds_nothing(cli: Callable) -> None:
    result = cli("examine", TINY, "-p", "quantize{weights=int4:g100},fuse", "--json", "-")
    data = json.loads(result.out)
    assert result.code == 1
    assert data["findings"][0]["what"].startswith("pass 'quantize' found no site; asked for: weights=int4:g100")
    assert data["findings"][0]["remedy"] == "quantize{weights=int4:g64}"
    assert "try: quantize{weights=int4:g64}" in result.err
