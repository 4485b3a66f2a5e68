"""Tables of the documentation, from the harness's files."""

from __future__ import annotations

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = spec_from_file_location("tables_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    for date, ms in (("2026-01-01", 9.0), ("2026-02-01", 7.5912345)):
        facts = {"gpu": "NVIDIA H100", "driver": "580", "commit": "abc", "torch": "2.11.0", "triton": "3.6.0"}
        rows = [{"name": "eager", "ms": ms, "ok": True}, {"name": "peer", "failed": "TypeError: a | b"}]
        (tmp_path / f"{date}-h100-decode.json").write_text(json.dumps({"environment": facts, "rows": rows}))
    return module


def test_the_newest_file_and_its_circumstances(generate: ModuleType) -> None:
    assert generate.table("*-h?00-decode.json", ["name", "ms", "ok"]) == (
        "| name | ms | ok |\n| --- | --- | --- |\n"
        "| eager | 7.591 | True |\n| peer | failed: TypeError: a \\| b |  |\n\n"
        "`benchmarks/results/2026-02-01-h100-decode.json`:\n"
        "NVIDIA H100, driver 580, commit abc,\ntorch 2.11.0, triton 3.6.0.\n"
    )


def test_a_named_file(generate: ModuleType) -> None:
    assert "| eager | 9 |" in generate.table("2026-01-01-h100-decode.json", ["name", "ms"])


def test_no_file_yet(generate: ModuleType) -> None:
    marker = "<!-- table *-h?00-other.json: name,\nms -->"
    text = f"{marker}\n| stale |\n<!-- end -->\n"
    assert generate.refresh(text) == f"{marker}\nNot measured yet.\n<!-- end -->\n"
