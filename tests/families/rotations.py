"""Measures what `rotate` makes of every family and writes docs/rotations.json: `python -m tests.families.rotations`.

Without names every row is measured, some ten minutes; with names only the rows that contain one, the others stay as
they are. Then `python docs/generate.py` writes the page.
"""

from __future__ import annotations

import json
import platform
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

import fuseline
from fuseline import Pipeline
from fuseline.compiler import ops
from fuseline.compiler.precision import error, floats
from fuseline.compiler.program import Program
from fuseline.compiler.provenance import makers
from fuseline.models.demo import smollm2

from .choosing import chosen
from .promoted import captured, precision
from .registry import ROWS
from .rows import Row, tokens

PIPELINE = "raise{allow_empty},rotate{r1,r2,r3,r4,allow_empty}"
CENTRED = "rotate/layer norm of a centred stream"
ROTATIONS = ("R1", "R2", "R3", "R4")
BOUNDS = {"float32": 1e-5, "float64": 1e-12}
RECORDS = Path(__file__).resolve().parents[2] / "docs" / "rotations.json"
REAL = "SmolLM2-135M"
FIRST = (
    REAL, "Llama", "Qwen 2", "Qwen 3", "Mistral", "Mixtral, grouped_mm", "Mixtral, batched_mm",
    "Qwen 3 MoE, grouped_mm", "Qwen 3 MoE, batched_mm", "Gemma 2", "Phi 3", "OLMo 2", "Granite", "GPT-2", "OPT", "BERT",
)  # fmt: skip


class Real(Row):
    """A row whose weights are real ones."""

    def model(self, seed: int = 0, smooth: bool = False) -> torch.nn.Module:
        return self.build().eval()


def _inputs(batch: int, seed: int) -> dict[str, Any]:
    return {"input_ids": tokens(batch, seed=seed), "use_cache": False}


_REAL = Real(REAL, "decoder", "real weights", lambda: smollm2("demo:smollm2", None).model, _inputs)
ORDER = {name: {**ROWS, REAL: _REAL}[name] for name in (*FIRST, *(n for n in ROWS if n not in FIRST))}
"""Every row, those first that the pass's bounds are stated for."""


def measured(row: Row) -> dict[str, Any]:
    """A row's record: for each rotation what was folded, is left at run time and was refused; the largest errors.

    float32 as the model is; float64 with the model's own casts promoted, where the same must be rewritten.
    """
    try:
        programs = {name: captured(row, getattr(torch, name)) for name in BOUNDS}
    except fuseline.UserError as problem:
        return {"not one graph": f"{problem.headline.partition(': ')[2].split()[0]}"}
    found = {}
    for name, before in programs.items():
        with precision(getattr(torch, name)):
            found[name] = rotated(before)
    assert found["float32"][0] == found["float64"][0], "the same is rewritten in both precisions"
    errors = {name: float(f"{off:.1e}") for name, (_, off) in found.items()}
    return {"rotations": found["float32"][0], "error": errors}


def rotated(before: Program) -> tuple[dict[str, Any], float]:
    """What `PIPELINE` did, and the largest error of an output."""
    after, report = Pipeline(PIPELINE).run(before, verification="full")
    results = zip(*(floats(p.run(before.examples)) for p in (after, before)), strict=True)
    done = report["rotate"]
    left = [makers(n)[-1] for n in after.graph.nodes if n.target is ops.hadamard.overload]
    means = sum(n.target is torch.ops.aten.mean.dim and makers(n)[-1:] == (CENTRED,) for n in after.graph.nodes)
    found: dict[str, Any] = {}
    for label in ROTATIONS:
        folds = {rule.removeprefix(f"{label} "): n for rule, n in done.rules.items() if rule.startswith(label)}
        refused = Counter(general(r.partition(": ")[2]) for r in done.refused.values() if r.startswith(label))
        record = {
            "folded": {kind: folds[f"into {kind}"] for kind in ("rows", "columns") if f"into {kind}" in folds},
            "sites": folds.get("online", 0),
            "online": sum(maker.startswith(f"rotate/{label}") for maker in left) + (means if label == "R1" else 0),
            "refused": dict(sorted(refused.items())),
        }
        found[label] = {key: value for key, value in record.items() if value}
    return found, max((error(a, b) for a, b in results), default=0.0)


def general(reason: str) -> str:
    """A reason without the names and numbers of one model."""
    reason = re.sub(r"\w+ \(([^()]*)\)", r"\1", re.sub(r"<built-in function (\w+)>", r"\1", reason))
    return re.sub(r"\b\d+ (operations|others)", r"more than two \1", reason)


def records() -> dict[str, Any]:
    """What was measured last, as committed."""
    return json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else {"rows": {}}


def write(name: str, record: dict[str, Any]) -> None:
    """Puts a row's record in its place among those that the file holds now."""
    rows = {**records()["rows"], name: record}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    page = {
        "versions": {**versions, "transformers": transformers.__version__},
        "pipeline": PIPELINE.replace("{allow_empty}", "").replace(",allow_empty", ""),
        "bounds": BOUNDS,
        "first": list(FIRST),
        "rows": {name: rows[name] for name in ORDER if name in rows},
    }
    RECORDS.write_text(f"{json.dumps(page, indent=1, ensure_ascii=False)}\n", encoding="utf-8")


def main() -> None:
    for name, row in chosen(ORDER, lambda: records()["rows"], __doc__):
        started = time.perf_counter()
        record = measured(row)
        write(name, record)
        print(f"{name:32} {record.get('error', 'not one graph')}  {time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
