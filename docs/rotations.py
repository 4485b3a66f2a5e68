"""The page docs/rotations.md, from the records of `python -m tests.families.rotations` in docs/rotations.json."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent / "rotations.json"
COLUMNS = ("family", "R1", "R2", "R3", "R4", "left at run time", "float32", "float64")
INTRODUCTION = """\
# Rotations

What `{pipeline}` makes of every family: written by `python docs/generate.py` from
`docs/rotations.json`, which `python -m tests.families.rotations` measures and `tests/families/test_rotations.py` holds
the code to. Tiny models of random weights, norm scales and biases, and SmolLM2-135M itself, on a CPU:
{versions}.

| a cell says | |
|---|---|
| 5 + 11 | folded into the rows of 5 weights, which write the rotated values, and the columns of 11, which read them |
| 2 sites | rotated at run time, in 2 attentions (R3) or before 2 products (R4) |
| + 1 online | operations that R1 or R2 leaves at run time: behind a tied embedding, before a last norm |
| 3 refused (4) | 3 sites were left alone, for reason 4 below |
| – | there is no such site: no attention was recognised, no product is read behind an activation |

Errors are max|Δ| / max|reference| over all outputs: in float32 as the model is, bound {single:.0e}, and in float64 with
the casts of the model's own promoted, bound {double:.0e}. The same sites are rewritten in both. "Left at run time"
counts the operations that are new in the graph: two Hadamard transforms for each attention of R3, one for each input of
R4, and those of R1, a mean among them where a stream of layer norms is centred behind what is no product.

{summary}
"""


def page() -> str:
    record = json.loads(RECORDS.read_text(encoding="utf-8"))
    rows: dict[str, Any] = record["rows"]
    reasons: dict[str, int] = {}
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    bounds = record["bounds"]
    first = {name: row for name, row in rows.items() if name in record["first"]}
    tables = {
        "The families that the bounds are stated for": first,
        "All others": {name: row for name, row in rows.items() if name not in first},
    }
    parts = [
        INTRODUCTION.format(
            pipeline=record["pipeline"], versions=versions, summary=summary(rows),
            single=bounds["float32"], double=bounds["float64"],
        )
    ]  # fmt: skip
    for title, some in tables.items():
        lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(name, row, reasons) for name, row in some.items())]
        parts.append(f"## {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    notes = "\n".join(wrapped(f"{number}. {reason}", "   ") for reason, number in reasons.items())
    parts.append(f"## Why not\n\nEach has a counter-example in `tests/passes/test_rotate_refusals.py`.\n\n{notes}\n")
    return "\n".join(parts)


def summary(rows: dict[str, Any]) -> str:
    measured = [row for row in rows.values() if "error" in row]
    folded = Counter(label for row in measured for label, cell in row["rotations"].items() if "folded" in cell)
    worst = {name: max(row["error"][name] for row in measured) for name in ("float32", "float64")}
    return wrapped(
        f"{len(rows)} rows, {len(measured)} of them captured as one graph. R1 folds in {folded['R1']}, R2 in "
        f"{folded['R2']}. The largest error is {worst['float32']:.1e} in float32 and {worst['float64']:.1e} in float64."
    )


def cells(name: str, row: dict[str, Any], reasons: dict[str, int]) -> list[str]:
    if "error" not in row:
        return [name, f"not captured as one graph: {row['not one graph']}", *[""] * (len(COLUMNS) - 2)]
    shown = [cell(label, found, reasons) for label, found in row["rotations"].items()]
    left = sum(found.get("online", 0) for found in row["rotations"].values())
    return [name, *shown, str(left), *(f"{off:.0e}" if off else "0" for off in row["error"].values())]


def cell(label: str, found: dict[str, Any], reasons: dict[str, int]) -> str:
    parts = []
    if "folded" in found:
        parts.append(" + ".join(str(found["folded"].get(side, 0)) for side in ("rows", "columns")))
    if "sites" in found:
        parts.append(f"{found['sites']} sites")
    elif "online" in found:
        parts.append(f"+ {found['online']} online")
    for reason, count in found.get("refused", {}).items():
        number = reasons.setdefault(f"{label}: {reason}", len(reasons) + 1)
        parts.append(f"{count} refused ({number})")
    return ", ".join(parts).replace(", +", " +") or "–"


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 116, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
