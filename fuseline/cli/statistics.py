"""Where a pipeline's time went, pass by pass and rule by rule, and how often each rule was tried and fired."""

from __future__ import annotations

from typing import Any

from fuseline.cli.output import Output
from fuseline.cli.render import table
from fuseline.compiler.observe.statistics import Statistics


def statistics_data(seen: Statistics) -> list[dict[str, Any]]:
    """One entry a rule: pass, rule, tried (None where the rule searches in its own way), rewritten, refused, ms."""
    return [
        {
            "pass": step,
            "rule": rule,
            "tried": figures.tried,
            "rewritten": figures.rewritten,
            "refused": figures.refused,
            "ms": round(figures.ms, 2),
        }
        for (step, rule), figures in seen.by_rule.items()
    ]


def show_statistics(output: Output, data: dict[str, Any]) -> None:
    """A row a pass, below it its rules by time, then what was spent outside of them and on the checks after it."""
    rows: list[list[str]] = []
    for record in data["passes"]:
        rules = [s for s in data["statistics"] if s["pass"] == record["name"]]
        ms, spent = record["ms"], sum(s["ms"] for s in rules)
        rows.append([record["name"], "", str(record["matched"]), str(len(record["refused"])), f"{ms:.1f}"])
        for s in sorted(rules, key=lambda s: -s["ms"]):
            timed = s["ms"] > 0
            tried = "-" if s["tried"] is None else str(s["tried"])
            name = s["rule"] or "(no rule)"
            rows.append(
                [f"  {name}", tried, str(s["rewritten"]), str(s["refused"]), f"{s['ms']:.1f}" if timed else "-"]
            )
        if spent:
            rows.append(["  around them", "", "", "", f"{max(ms - spent, 0.0):.1f}"])
        rows.append(["  checks", "", "", "", f"{record['verify_ms']:.1f}"])
    output.line()
    table(output, ["pass and rule", "tried", "sites", "refused", "ms"], rows)
