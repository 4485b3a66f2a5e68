"""The figures of the documentation, drawn from the files in benchmarks/results: `figures` gives each path's SVG."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fuseline.cli.charts import Series, chart

ROOT = Path(__file__).resolve().parent.parent
IMAGES, RESULTS = ROOT / "docs" / "images", ROOT / "benchmarks" / "results"
SPARSITY = ("gate only", "uniform", "teal uniform", "teal greedy", "sensitivity", "searched")

if str(ROOT / "benchmarks") not in sys.path:  # whose own modules draw some of them
    sys.path.append(str(ROOT / "benchmarks"))


def figures() -> dict[Path, str]:
    """Path → SVG, of what was measured."""
    drawn = {"sparsity.svg": sparsity(), "decode-roofline.svg": roofline(), "checkpoint.svg": checkpointing()}
    return {IMAGES / name: text for name, text in drawn.items() if text is not None}


def roofline() -> str | None:
    """The kernels of the decode step, from the newest record of `benchmarks/decode.py --all` on a GPU."""
    record = newest("decode-kernels")
    if record is None:
        return None
    from decoding.roofline import drawn

    return drawn(record)


def checkpointing() -> str | None:
    """Memory and time of training steps, from the newest record of `benchmarks/checkpoint.py` on a GPU."""
    record = newest("checkpoint")
    if record is None:
        return None
    from checkpoints.pareto import drawn

    return drawn(record, "1b-32k")


def newest(name: str, machine: str = "h?00") -> dict[str, Any] | None:
    """The newest record of that name from a GPU, or from another machine."""
    found = sorted(RESULTS.glob(f"*-{machine}-{name}.json"))
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else None


def sparsity() -> str | None:
    """What each budget costs by each method, from the newest record of benchmarks/sparsity.py."""
    record = newest("sparsity", "cpu")
    if record is None:
        return None
    rows = [row for row in record["rows"] if "kl" in row]
    lines = {method: [(row["budget"], row["kl"]) for row in rows if row["method"] == method] for method in SPARSITY}
    series = [Series(method, points) for method, points in lines.items() if points]
    return chart("SmolLM2-135M: bytes read, and KL on text that was not seen", "bytes read", "KL, nats", series)
