"""The benchmarks of activation sparsity, on a tiny model and without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(ROOT))


@pytest.mark.slow
def test_methods_at_one_budget(tmp_path: Path) -> None:
    import sparsity

    out = tmp_path / "sparsity.json"
    words = "--device cpu --model demo:tiny-llama --sparsity 30 --windows 2 --calibration 3 --length 48 --trials 8"
    sparsity.main([*words.split(), "--calls", "1", "--json", str(out)])
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert len(rows) == len(sparsity.METHODS) and not any("failed" in row for row in rows.values())
    for name, row in rows.items():
        assert 0 < row["kl_last_tenth"] < row["kl"], name  # most positions are dense there
        if "read" in row:
            assert row["read"] == pytest.approx(0.7, abs=2e-3)
    assert rows["30% searched"]["kl"] < rows["30% teal uniform"]["kl"]
    assert rows["30% uniform"]["branches"] == 8 and rows["30% searched channels"]["branches"] == 0


def test_gate_only_cannot_go_below_what_it_leaves_dense() -> None:
    from sparsities.cats import fraction

    assert fraction(0.8, 100, 50) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"50.0% of the bytes at the least"):
        fraction(0.5, 100, 50)


def test_linears_are_what_they_say() -> None:
    """The benchmark's problems against plain PyTorch, and that its candidates are emitted."""
    import sparse_linears

    problem = sparse_linears.Problem("smollm2.down", "bf16", 2, rank=8)
    torch.manual_seed(0)
    inputs, weights = problem.inputs("cpu", 0.5), problem.weights("cpu")
    x, side, threshold = inputs
    assert ((x.abs().float() <= threshold).float().mean() - 0.5).abs() < 0.01
    down, up, weight = (w.double() for w in weights)
    kept = torch.where(x.abs().float() > threshold, x, 0).double()
    expected = side.double() + kept @ weight + (x.double() - kept) @ down.T @ up
    found = problem.region(*(t.double() for t in (*inputs, *weights)))
    assert (found - expected).abs().max() < 1e-9
    configs = list(sparse_linears.candidates(sparse_linears.Problem("smollm2.gate_up", "int4", 1)))
    assert configs and all(problem.emit(config).kernels for config in configs[:3])
