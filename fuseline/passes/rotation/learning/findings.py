"""What each rotation brought, as a table: the record that `decide` leaves in a plan, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ....compiler.framework import Findings
from ....compiler.plan import SitePlan

if TYPE_CHECKING:
    from .. import Rotate

MODEL = ""
"""The site in a plan for what holds for the whole model."""

Row = tuple[str, str, str, str]


def findings(step: Rotate, decisions: Mapping[str, SitePlan]) -> Findings:
    """A row for every set of rotations that was measured: its loss, and what it brought against the set before it."""
    decided = decisions[MODEL].structure
    measured: dict[str, float] = dict(decided["measured"])
    asked = "+".join(step.asked)
    rows: list[Row] = []
    if "start" in measured:
        start, learned = measured.pop("start"), measured.pop("learned")
        pays = learned < start
        rows += [
            (f"{asked} at the start", f"{start:.3g}", "", "" if pays else "kept"),
            (f"{asked} learned", f"{learned:.3g}", _change(learned, start), "kept" if pays else ""),
        ]
    if "none" in measured:
        rows += _rounds(measured, len(decided["keep"]))
    sites = Counter(label for decision in decisions.values() for label in decision.tensors)
    lines = [f"learned {label} at {count} site{'s' * (count > 1)}" for label, count in sites.items()]
    if step.choose:
        lines.append(f"kept: {', '.join(decided['keep']) or 'none of them'}")
    return Findings(("rotations", decided["loss"], "change", "found"), tuple(rows), tuple(lines))


def _rounds(measured: Mapping[str, float], kept: int) -> list[Row]:
    """Sets of one against none, sets of two against the best of one, …; the best of the first `kept` rounds stayed."""
    before = measured["none"]
    rows: list[Row] = [("none", f"{before:.3g}", "", "")]
    rounds: dict[int, dict[str, float]] = {}
    for name, value in measured.items():
        if name != "none":
            rounds.setdefault(name.count("+") + 1, {})[name] = value
    for size, tried in rounds.items():
        best = min(tried, key=lambda name: tried[name])
        for name, value in tried.items():
            found = "does not pay" if size > kept else "kept" if name == best else ""
            rows.append((name, f"{value:.3g}", _change(value, before), found))
        before = tried[best]
    return rows


def _change(value: float, before: float) -> str:
    return f"{value / before - 1:+.1%}" if before else "-"
