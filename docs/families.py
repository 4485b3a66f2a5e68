"""The page docs/families.md, from the records of `python -m tests.families` in docs/families.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).resolve().parent / "families.json"
COLUMNS = ("family", "what sets it apart", "graphs", "raise", "raise,fuse", "int8", "to torchao's", "int4:g32")
GENERAL = (
    (r"only=\S+", "only=…"),
    (r"\[[\d, ]+\]", "[…]"),
    (r"(group size \d+ does not divide) \d+( \([\d, ]+would\))?", r"\1 the inputs"),
)
INTRODUCTION = """\
# Families

Written by `python docs/generate.py` from `docs/families.json`, which `python -m tests.families` measures and the tests
in `tests/families` hold the code to. Tiny models with random weights, captured through `fuseline.optimize` on a CPU, in
float32: {versions}.

| outcome | means |
|---|---|
| exact, with the error | sites were rewritten; the outputs are eager's within {bound:.0e} of the largest value |
| a number, in nats | a lossy pass rewrote sites: the KL divergence of the logits from eager's |
| refused | no site was rewritten, for the reason that the number points to; the outputs are eager's |
| fails | the reason below: nothing was compiled, or the result is wrong |

Weights are drawn so that logits spread (standard deviation 1 to 2; for the divergence all logits are brought to 2):
those that models are initialised with give logits so near to uniform that nothing would count. "To torchao's" is the
divergence of `quantize{{weights=int8}}` over that of torchao's int8 weight-only quantization of the same weights: the
geometric mean over many draws of weights and inputs, with its standard error; below 1, ours is nearer to eager. There,
mixtures route every token to every expert, since the few tokens whose experts change would outweigh all others.

{summary}
"""


def page() -> str:
    record = json.loads(RECORDS.read_text(encoding="utf-8"))
    rows: dict[str, Any] = record["rows"]
    reasons: dict[str, int] = {}
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    parts = [INTRODUCTION.format(versions=versions, bound=record["bound"], summary=summary(rows))]
    for kind in dict.fromkeys(row["kind"] for row in rows.values()):
        lines = [COLUMNS, ["---"] * len(COLUMNS)]
        lines += [cells(name, row, reasons) for name, row in rows.items() if row["kind"] == kind]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        parts.append(f"## {kind[0].upper()}{kind[1:]}\n\n{table}")
    parts.append(notes("Why not", {f"{number}. {reason}": [] for reason, number in reasons.items()}))
    parts.append(notes("Sites left alone where the rest was quantized", left_alone(rows)))
    parts.append(notes("Graph breaks", breaks(rows)))
    return "\n".join(part for part in parts if part)


def summary(rows: dict[str, Any]) -> str:
    exact = [r for r in rows.values() if {o["outcome"] for o in first_two(r)} <= {"exact", "refused"}]
    ratios = [r["torchao"]["ratio"] for r in rows.values() if "torchao" in r]
    text = f"{len(rows)} rows, {len(exact)} of them captured and equal to eager under both exact pipelines."
    if ratios:
        within = sum(r["torchao"]["ratio"] <= 1.02 for r in rows.values() if "torchao" in r)
        text += f" int8 beside torchao's in {len(ratios)}: at most 2% above in {within}, "
        text += f"from {min(ratios):.3f} to {max(ratios):.3f}."
    return wrapped(text)


def first_two(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row["passes"]["raise"], row["passes"]["raise,fuse"]]


def cells(name: str, row: dict[str, Any], reasons: dict[str, int]) -> list[str]:
    outcomes = row["passes"]
    graphs = max(o.get("graphs", 0) for o in outcomes.values())
    peer = row.get("torchao")
    beside = f"{peer['ratio']:.3f} ± {peer['deviation']:.3f}" if peer else ""
    shown = {column: cell(outcome, reasons) for column, outcome in outcomes.items()}
    return [
        name, row["traits"], str(graphs), shown["raise"], shown["raise,fuse"], shown["int8"], beside, shown["int4"],
    ]  # fmt: skip


def cell(outcome: dict[str, Any], reasons: dict[str, int]) -> str:
    if outcome["outcome"] == "exact":
        return f"exact {outcome['error']:.0e}" if outcome["error"] else "exact 0"
    if outcome["outcome"] == "lossy":
        return f"{outcome['kl']:.2g}"
    number = reasons.setdefault(general(outcome["reason"]), len(reasons) + 1)
    return f"{outcome['outcome']} ({number})"


def left_alone(rows: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        for outcome in row["passes"].values():
            for reason in outcome.get("refused", {}) if outcome["outcome"] == "lossy" else ():
                found.setdefault(general(reason), []).append(name)
    return {reason: list(dict.fromkeys(names)) for reason, names in found.items()}


def breaks(rows: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, row in rows.items():
        for reason in row["passes"]["raise"].get("breaks", {}):
            found.setdefault(reason, []).append(name)
    return found


def general(reason: str) -> str:
    """A reason without the names and sizes of the one model that it was given for."""
    for pattern, plain in GENERAL:
        reason = re.sub(pattern, plain, reason)
    return reason


def notes(title: str, found: dict[str, list[str]]) -> str:
    if not found:
        return ""
    items = []
    for reason, names in found.items():
        who = f" ({len(names)} rows)" if len(names) > 6 else f" ({'; '.join(names)})" if names else ""
        numbered = bool(re.match(r"\d+\. ", reason))
        items.append(wrapped(f"{'' if numbered else '- '}{reason}{who}", "   " if numbered else "  "))
    return f"## {title}\n\n" + "\n".join(items) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    import textwrap

    return textwrap.fill(text, 116, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def counts(rows: dict[str, Any]) -> Counter[str]:
    """Outcomes over the whole table."""
    return Counter(outcome["outcome"] for row in rows.values() for outcome in row["passes"].values())
