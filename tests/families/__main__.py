"""Measures the family table and writes docs/families.json: `python -m tests.families [ROW …]`.

Without names every row is measured, some minutes; with names only the rows that contain one, the others stay as they
are. Rows are compared with torchao where it can be imported (`pip install --no-deps --target DIRECTORY torchao`,
`PYTHONPATH=DIRECTORY`), and keep the comparison that they have where it cannot. Then `python docs/generate.py` writes
the page.
"""

from __future__ import annotations

import json
import platform
import time
from importlib.util import find_spec
from typing import Any

import torch
import transformers

from .choosing import chosen
from .measure import BOUND, PASSES, Outcome, measure
from .registry import RECORDS, ROWS, records
from .rows import Row


def measured(row: Row, before: dict[str, Any]) -> dict[str, Any]:
    """A row's record; `before`: the one that it had."""
    outcomes = {column: measure(row, column) for column in PASSES}
    passes = {column: shortened(outcome) for column, outcome in outcomes.items()}
    passes["raise,fuse"].pop("rules", None)  # what `fuse` joins is its own tests' business
    record: dict[str, Any] = {"kind": row.kind, "traits": row.traits, "passes": passes}
    if outcomes["int8"].outcome == "lossy":
        if find_spec("torchao"):
            from .peer import compare, record as compared

            record["torchao"] = compared(compare(row))
        elif "torchao" in before:
            record["torchao"] = before["torchao"]
    return record


def shortened(outcome: Outcome) -> dict[str, Any]:
    """An outcome with its figures cut to the digits that are worth keeping."""
    record = outcome.to_json()
    if "error" in record:
        record["error"] = float(f"{record['error']:.1e}")
    if "kl" in record:
        record["kl"] = float(f"{record['kl']:.4g}")
    return record


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    if find_spec("torchao"):
        import torchao

        found["torchao"] = torchao.__version__
    return found


def main() -> None:
    for name, row in chosen(ROWS, lambda: records()["rows"], __doc__):
        before = records()["rows"].get(name)
        started = time.perf_counter()
        record = measured(row, before or {})
        write(name, record)
        said = [f"{column}: {outcome['outcome']}" for column, outcome in record["passes"].items()]
        print(f"{name:32} {', '.join(said)}  {time.perf_counter() - started:.0f} s", flush=True)


def write(name: str, record: dict[str, Any]) -> None:
    """Puts a row's record in its place among those that the file holds now."""
    known = records()
    rows = {**known["rows"], name: record}
    page = {
        "versions": {**known.get("versions", {}), **versions()},
        "bound": BOUND,
        "rows": {name: rows[name] for name in ROWS if name in rows},
    }
    RECORDS.write_text(f"{json.dumps(page, indent=1, ensure_ascii=False)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
