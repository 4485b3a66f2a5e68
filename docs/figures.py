"""The figures of the documentation, drawn from the files in benchmarks/results: `figures` gives each path's SVG."""

from __future__ import annotations

import json
from pathlib import Path

from fuseline.cli.charts import Series, chart

ROOT = Path(__file__).resolve().parent.parent
SPARSITY = ("gate only", "uniform", "teal uniform", "teal greedy", "sensitivity", "searched")


def figures() -> dict[Path, str]:
    """Path → SVG."""
    return {ROOT / "docs" / "images" / "sparsity.svg": sparsity()}


def sparsity() -> str:
    """What each budget costs by each method, from the newest record of benchmarks/sparsity.py."""
    name = max((ROOT / "benchmarks" / "results").glob("*-cpu-sparsity.json"))
    rows = [row for row in json.loads(name.read_text(encoding="utf-8"))["rows"] if "kl" in row]
    lines = {method: [(row["budget"], row["kl"]) for row in rows if row["method"] == method] for method in SPARSITY}
    series = [Series(method, points) for method, points in lines.items() if points]
    return chart("SmolLM2-135M: bytes read, and KL on text that was not seen", "bytes read", "KL, nats", series)
