"""`fuseline why`: what is printed for a match, a refusal and a miss, and its exit codes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

HAND_WRITTEN = '''
import torch


class Net(torch.nn.Module):
    """Three norms written out: one as it should be, one with a cube, one over the wrong dimension."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = Norm(2, -1), Norm(3, -1), Norm(2, 0)

    def forward(self, x):
        return self.third(self.second(self.first(x)))


class Norm(torch.nn.Module):
    def __init__(self, power, dim):
        super().__init__()
        self.power, self.dim = power, dim
        self.weight = torch.nn.Parameter(torch.ones(8))

    def forward(self, x):
        variance = x.pow(self.power).mean(self.dim, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


def factory():
    return Net(), (torch.randn(8, 8),)
'''


@pytest.fixture
def graph(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(HAND_WRITTEN)
    return f"py:{tmp_path / 'net.py'}:factory"


def test_a_match(cli: Callable, graph: str) -> None:
    result = cli("why", "raise/RMSNorm", "first", graph, "--json", "-")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["verdict"] == "matches" and data["site"] == "first" and data["graph"] == graph
    (fit,) = [fit for e in data["explanations"] for fit in e["fits"]]
    assert fit["site"] == "first/mul#1" and fit["module"] == "first" and len(fit["nodes"]) == 6
    assert result.err.startswith("raise/RMSNorm at first: matches\n")
    assert re.search(r"^rule      \S*passes/raising/rms_norm\.py:\d+$", result.err, re.MULTILINE)


def test_a_miss_names_the_constraint_the_node_and_the_line(cli: Callable, graph: str) -> None:
    result = cli("why", "raise/RMSNorm", "second", graph)
    assert result.code == 1
    lines = result.out.splitlines()
    assert lines[0] == "raise/RMSNorm at second: no match"
    at = next(i for i, line in enumerate(lines) if line.startswith("missed "))
    assert lines[at] == "missed    expected the number 2, found 3"
    assert re.fullmatch(r" +pow_2 = pow\(\w+, 3\)", lines[at + 1])
    assert re.fullmatch(r" +second  \S*net\.py:23", lines[at + 2])
    pattern, marks = lines[at + 3], lines[at + 4]
    assert pattern == "pattern   h * rsqrt(mean(pow(h, 2), dim=dims, keepdim=True) + eps)"
    assert marks.strip() == "^" and pattern[marks.index("^")] == "2"
    assert lines[-1].startswith("next: fuseline why raise py:") or "next: " in result.out


def test_a_refusal(cli: Callable, graph: str) -> None:
    result = cli("why", "raise/RMSNorm", "net.py:24", graph)
    assert result.code == 0, "one of the three matches there"
    result = cli("why", "raise/RMSNorm", "third", graph)
    assert result.code == 1
    assert "refused   the mean runs over the dimensions [0] of 2, not over the last one" in result.out


def test_the_near_misses_of_a_graph(cli: Callable, graph: str) -> None:
    result = cli("why", "raise/RMSNorm", graph, "--json", "-")
    assert result.code == 1
    (miss,) = [miss for e in json.loads(result.out)["explanations"] for miss in e["misses"]]
    assert (miss["fits"], miss["parts"], miss["module"]) == (7, 8, "second")
    assert miss["problems"][0]["text"] == "expected the number 2, found 3"
    assert "7/8" in result.err and f"fuseline why raise/RMSNorm {miss['root']} {graph}" in result.err


@pytest.mark.slow
def test_after_other_passes(cli: Callable, graph: str) -> None:
    result = cli("why", "raise/RMSNorm", "first", graph, "-p", "raise")
    assert result.code == 1 and "raise/RMSNorm at first: no match" in result.out
    assert cli("why", "raise", "demo:tiny-decoder", "-p", "raise").code == 0, "nothing is left to miss"


@pytest.mark.slow
def test_a_pass_with_a_run_of_its_own(cli: Callable) -> None:
    result = cli("why", "quantize/linear", "layers.0.up", "demo:tiny-decoder")
    assert result.code == 0 and "matches   as linear, 1 nodes" in result.out
    result = cli("why", "quantize{weights=int4:g7}/linear", "layers.0.up", "demo:tiny-decoder")
    assert result.code == 1 and re.search(r"refused   .*\b7\b", result.out)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("raise/RMSNrm", "norm", "demo:tiny-decoder"), "did you mean 'RMSNorm'"),
        (("rais/RMSNorm", "norm", "demo:tiny-decoder"), "did you mean 'raise'"),
        (("raise/RMSNorm", "layers.0.attention_nrm", "demo:tiny-decoder"), "did you mean 'layers.0.attention_norm'"),
        (("raise/RMSNorm", "norm", "demo:tiny-decodr"), "did you mean 'tiny-decoder'"),
        (("raise/RMSNorm", "a", "b", "c"), "too many arguments"),
    ],
)
def test_mistakes(cli: Callable, arguments: tuple[str, ...], message: str) -> None:
    result = cli("why", *arguments)
    assert result.code == 2 and message in result.err
