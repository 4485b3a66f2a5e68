"""The benchmark of long sequences in its small form: every method starts from the same loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sequence_parallel

pytest.importorskip("transformers")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_methods_agree(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    words = "--device cpu --shape tiny --dtype float32 --lengths 16 32 --target eager --steps 1 --warm 1 --tiles 2"
    methods = ["fuseline", "fsdp", "ulysses", "alst"]  # context_parallel has no attention for CPUs
    sequence_parallel.main([*words.split(), "--methods", *methods, "--json", str(path)])
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert not [row for row in rows.values() if "failed" in row or "skipped" in row], rows
    for length in (16, 32):
        losses = [rows[f"{method} {length}"]["loss"] for method in methods]
        assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
