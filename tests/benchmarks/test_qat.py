"""The benchmark of quantization-aware training in its smallest form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import qat
import torch
from training import Corpus


@pytest.mark.slow
def test_a_few_steps(tmp_path: Path) -> None:
    path = tmp_path / "qat.json"
    words = "--device cpu --quick --steps 12 --qat-steps 6 --windows 4 --seeds 2 --hidden 32 --layers 1 --converted"
    rows = ["full precision", "PARQ 1", "WinQ 2"]
    qat.main([*words.split(), "--bytes", "400000", "--only", *rows, "--json", str(path)])
    record = json.loads(path.read_text())
    found = {row["name"]: row for row in record["rows"]}
    assert list(found) == rows and not any("failed" in row for row in found.values())
    for name, row in found.items():
        assert row["loss"] == pytest.approx(sum(row["losses"]) / 2) and row["spread"] >= 0
        assert row["cost"] == pytest.approx(row["loss"] - found["full precision"]["loss"])
        if name != "full precision":
            assert row["converted"] == pytest.approx(row["losses"][0], rel=1e-5)
    assert record["corpus"]["parameters"] > 0


@pytest.mark.slow
def test_the_held_out_text_is_not_trained_on() -> None:
    corpus = Corpus(200_000, torch.device("cpu"))
    training, held_out = (bytes(part.tolist()) for part in (corpus.training, corpus.held_out))
    assert 0.02 < len(held_out) / len(training) < 0.2
    texts = held_out.split(b"\n\n\n\n")
    assert not any(text in training for text in texts if len(text) > 500)
    same = Corpus(200_000, torch.device("cpu"))
    assert torch.equal(corpus.training, same.training)
    one, other = (next(corpus.batches(1, 2, 8, seed)) for seed in (0, 0))
    assert torch.equal(one, other) and one.shape == (2, 9)
