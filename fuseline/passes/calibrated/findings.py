"""What calibration found, for people: the sites of a kind together, by the last word of their path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ...compiler.framework import Findings
from ...compiler.plan import SitePlan


def findings(decisions: Mapping[str, SitePlan]) -> Findings:
    """Errors are Σ|Δ|² / Σ|result|² of the products on the calibration data, means over the sites of a kind."""
    kinds: dict[str, list[SitePlan]] = {}
    for site, decision in decisions.items():
        if "error" in decision.structure:
            kinds.setdefault(site.rpartition("/")[0].rpartition(".")[2] or site, []).append(decision)
    rows = []
    for kind, ones in kinds.items():
        before, after = (sum(one.structure[key] for one in ones) / len(ones) for key in ("error_nearest", "error"))
        change = f"{after / before - 1:+.1%}" if before else "-"
        rows.append((kind, str(len(ones)), f"{before:.3g}", f"{after:.3g}", change))
    return Findings(("sites", "count", "nearest", "found", "change"), tuple(rows), tuple(_lines(decisions)))


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
            f"warning: {len(few)} sites have fewer samples than channels ({least['rows']} for {least['channels']}):"
            " give more batches"
        )
    dead = sum(s.get("dead", 0) for s in found)
    if dead:
        lines.append(f"{dead} input channels were zero in all batches: their columns are rounded to nearest")
    damped = [s["damp"] for s in found if "damp" in s]
    if damped and max(damped) > min(damped):
        lines.append(f"{sum(d > min(damped) for d in damped)} sites took more damping, up to {max(damped):g}")
    return lines
