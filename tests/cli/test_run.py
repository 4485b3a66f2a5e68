"""`fuseline run`: the JSON has the documented keys, and the tables show the same data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fuseline import Tier
from fuseline.compiler import registry

QUANTIZE = "quantize{weights=int8}"
MODELS = """
import torch
from torch import nn

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))

class Chatty(Classifier):
    def forward(self, x):
        x = torch.relu(self.up(x))
        print(end="")
        return self.down(x)

class Looping(Classifier):
    def forward(self, x):
        for layer in (self.up, self.down):
            x = layer(x)
            print(end="")
        return x

def classifier():
    torch.manual_seed(0)
    return Classifier(), (torch.randn(3, 16),)

def chatty():
    return Chatty(), (torch.randn(3, 16),)

def looping():
    return Looping(), (torch.randn(3, 16),)

def sequential():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), (torch.randn(3, 16),)
"""


@pytest.fixture
def classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "cli_classifier.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "py:cli_classifier:classifier"


def test_json_and_tables(cli: Callable, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = cli("run", "demo:tiny-decoder", "-p", QUANTIZE, "--windows", "2", "--tokens", "4", "--json", str(file))
    assert result.code == 0, result.err
    data = json.loads(file.read_text())

    assert data["model"] == "demo:tiny-decoder" and data["pipeline"] == QUANTIZE
    (step,) = data["passes"]
    assert {"name", "tier", "ms", "matched", "refused", "nodes_before", "nodes_after", "error"} <= set(step)
    assert step["tier"] == "lossy" and step["matched"] == 14 and 0 < step["error"] < 0.1
    assert list(step["refused"]) == ["head/linear#0"]
    assert data["weights"]["after_bytes"] < data["weights"]["before_bytes"]
    metrics = data["metrics"]
    assert {"perplexity_before", "perplexity_after", "kl", "top1"} <= set(metrics)
    assert metrics["tokens"] == 512 and 0 < metrics["kl"] < 0.1 and 0.5 < metrics["top1"] <= 1
    assert metrics["perplexity_before"] != metrics["perplexity_after"], "the optimized model is the one measured"
    assert data["generated"].startswith(data["prompt"])
    assert {"python", "fuseline", "torch", "triton", "transformers", "device"} == set(data["versions"])
    assert data["captured"]["with_source_line"] >= 0.99

    table = result.out
    assert max(map(len, table.splitlines())) <= 80, table
    assert f"quantize  lossy     14        1  {step['nodes_before']} → {step['nodes_after']}" in table
    assert f"perplexity  {metrics['perplexity_before']:.3f} → {metrics['perplexity_after']:.3f}" in table
    assert f"the same top-1 token at {metrics['top1']:.2%}" in table
    assert "fuseline kernels demo:tiny-decoder" in table.splitlines()[-1]


def test_json_on_stdout_leaves_the_tables_to_stderr(cli: Callable, classifier: str) -> None:
    result = cli("run", classifier, "-p", QUANTIZE, "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert "quantize  lossy" in result.err
    assert data["metrics"]["kl"] is None and data["generated"] is None
    assert 0 < data["metrics"]["error"] < 0.1
    assert data["passes"][0]["error"] == pytest.approx(data["metrics"]["error"], rel=0.05)


def test_sequential_is_compiled(cli: Callable, classifier: str) -> None:
    """Dynamo skips nn.Sequential's forward when it is the outermost; that must never look like a perfect result."""
    result = cli("run", classifier.replace("classifier:classifier", "classifier:sequential"), "-p", QUANTIZE)
    assert result.code == 0, result.err
    assert "quantize  lossy      2" in result.out


def test_graph_breaks_are_listed(cli: Callable, classifier: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = cli("run", classifier.replace(":classifier", ":chatty"), "-p", QUANTIZE, "--json", str(file))
    assert result.code == 0, result.err
    line = 1 + MODELS.splitlines().index('        print(end="")')
    shown = " ".join(result.out.split())
    assert f"graph break cli_classifier.py:{line}: Dynamo does not know how to trace builtin operator" in shown
    (one,) = json.loads(file.read_text())["breaks"]
    assert one["line"] == line and one["file"].endswith("cli_classifier.py") and "`print`" in one["reason"]


def test_a_model_that_dynamo_leaves_to_python_is_an_error(cli: Callable, classifier: str) -> None:
    """Its figures would be those of the original."""
    result = cli("run", classifier.replace(":classifier", ":looping"), "-p", QUANTIZE)
    assert result.code == 1
    assert "Dynamo compiled no graph of Looping: the optimized model is the original" in result.err
    assert "`print`" in result.err and "(forward runs in Python as a whole)" in result.err
    assert "move what cannot be traced out of the forward" in result.err


def test_fuse_leads_to_kernels_that_compile(cli: Callable, classifier: str) -> None:
    pytest.importorskip("triton")
    result = cli("run", classifier, "-p", "fuse", "--json", "-", "--verify")
    assert result.code == 0, result.err
    kernels = json.loads(result.out)["kernels"]
    assert kernels
    for kernel in kernels:
        assert {"name", "ops", "lines", "targets"} <= set(kernel)
        assert kernel["targets"] == {"sm_80": "ok", "sm_90": "ok", "gfx942": "ok"}
        assert kernel["ops"]


def test_verify_holds_exact_passes_to_their_bound(
    cli: Callable, classifier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.find("quantize"), "tier", Tier.EXACT)
    result = cli("run", classifier, "-p", QUANTIZE, "--verify")
    assert result.code == 1
    assert "pass 'quantize' is exact and changed the results" in result.err
    assert "rounding allows 1e-05 more" in result.err


def test_dump_writes_every_stage(cli: Callable, classifier: str, tmp_path: Path) -> None:
    result = cli("run", classifier, "-p", QUANTIZE, "--dump", str(tmp_path / "stages"), "--verify=full")
    assert result.code == 0, result.err
    assert {"000_captured.py", "001_quantize.py"} <= {p.name for p in (tmp_path / "stages").iterdir()}


@pytest.mark.slow
def test_a_run_is_proved_before_it_is_measured(cli: Callable) -> None:
    options = ("--windows", "0", "--tokens", "0")
    result = cli("run", "demo:tiny-decoder", "-p", "raise,rotate{r4}", "--prove", *options)
    assert result.code == 0, result.err
    assert result.out.index("2 of 2 statements are proved, of 1 kinds") < result.out.index("weights  ")


def test_a_pass_that_matches_nothing(cli: Callable, classifier: str) -> None:
    result = cli("run", classifier, "-p", "raise")
    assert result.code == 2
    assert "pass 'raise' matched no site" in result.err and "allow_empty" in result.err


@pytest.mark.slow
def test_tiny_llama_generates_with_its_cache(cli: Callable) -> None:
    result = cli("run", "demo:tiny-llama", "-p", QUANTIZE, "--windows", "1", "--tokens", "3", "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["generated"].startswith(data["prompt"])
    assert data["passes"][0]["matched"] == 14
