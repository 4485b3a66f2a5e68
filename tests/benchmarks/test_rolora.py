"""RoLoRA in its small form: both models train alike, and the file can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import rolora

pytest.importorskip("transformers")
pytest.importorskip("peft", reason="pip install --no-deps peft")


@pytest.mark.slow
def test_a_few_steps_of_a_tiny_model(tmp_path: Path) -> None:
    path = tmp_path / "rolora.json"
    words = "--device cpu --model demo:tiny-llama --steps 4 --batch 2 --length 32 --windows 1 --rank 4 --lr 0.01"
    every = [*words.split(), "--seed", "3", "--json", str(path)]
    rolora.main(every)
    record = json.loads(path.read_text())
    untrained, row = record["rows"]
    assert not {"failed", "skipped"} & (untrained.keys() | row.keys()), record
    assert row["rolora_trained"] == pytest.approx(row["lora_trained"], rel=1e-4)
    assert row["rolora_losses"] == pytest.approx(row["lora_losses"], rel=1e-4)
    assert row["lora_trained"] < row["original"] == untrained["original"] and row["loss_last"] < row["loss_first"]
    assert len({row["lora"], row["rolora"], row["lora_trained"]}) == 3
    assert row["gain"] == row["lora"] - row["rolora"]
    rolora.main([*every, "--resume"])
    assert json.loads(path.read_text())["rows"] == record["rows"]
