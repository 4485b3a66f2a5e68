"""What calibration found, for people: the sites of a kind together, by the last word of their path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ...compiler.framework import Findings
from ...compiler.plan import SitePlan


def findings(decisions: Mapping[str, SitePlan]) -> Findings:
    """Before and after, means over the sites of a kind: of Σ|Δ|² / Σ|result|² of the products on the calibration data
    when they are rounded to nearest and as chosen; of smooth, the largest number that the products read."""
    measure = "error" if any("error" in one.structure for one in decisions.values()) else "largest"
    before, after = ("error_nearest", "error") if measure == "error" else ("largest_before", "largest")
    kinds: dict[str, list[dict[str, float]]] = {}
    for site, decision in decisions.items():
        if after in decision.structure:
            kinds.setdefault(site.rpartition("/")[0].rpartition(".")[2] or site, []).append(decision.structure)
    rows = []
    for kind, ones in kinds.items():
        was, now = (sum(one[key] for one in ones) / len(ones) for key in (before, after))
        rows.append((kind, str(len(ones)), f"{was:.3g}", f"{now:.3g}", f"{now / was - 1:+.1%}" if was else "-"))
    return Findings(("sites", "count", measure, "after", "change"), tuple(rows), tuple(_lines(decisions)))


def _lines(decisions: Mapping[str, SitePlan]) -> list[str]:
    found = [decision.structure for decision in decisions.values()]
    lines = []
    for key, what in (("reason", "left as they were"), ("unscaled", "without factors")):
        reasons = Counter(structure[key] for structure in found if key in structure)
        lines += [f"{what}, {count} x: {reason}" for reason, count in reasons.most_common()]
    few = [s for s in found if s.get("rows", 0) < s.get("channels", 0)]
    if few:
        least = min(few, key=lambda s: s["rows"] / s["channels"])
        lines.append(
            f"warning: fewer samples than channels at {len(few)} of {len(found)} sites, "
            f"{least['rows']} for {least['channels']}: give more batches"
        )
    dead = sum(s.get("dead", 0) for s in found)
    if dead:
        lines.append(f"{dead} input channels were zero in all batches: their columns are rounded to nearest")
    damped = [s["damp"] for s in found if "damp" in s]
    if damped and max(damped) > min(damped):
        lines.append(f"{sum(d > min(damped) for d in damped)} sites took more damping, up to {max(damped):g}")
    return lines
