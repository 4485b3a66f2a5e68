"""The table of budgets in its small form."""

from __future__ import annotations

import json
from pathlib import Path

import budgets
import pytest

pytest.importorskip("transformers")


def test_a_tiny_model(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    words = "--device cpu --model demo:tiny-llama --tokens 128 --calibration 256 --length 32 --schemes int4:g64:sym"
    budgets.main([*words.split(), "--json", str(path)])
    (row,) = json.loads(path.read_text())["rows"]
    assert not {"failed", "skipped"} & row.keys()
    assert row["bits"] == 4.5 and 4.3 < row["bits_auto"] <= 4.5
    assert 0 < row["kl_auto"] < row["kl_uniform"] and row["expected"] > 0
