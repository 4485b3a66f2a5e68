"""What `merge-experts` decided, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from ...compiler.framework import Findings
from ...compiler.plan import SitePlan


def findings(decisions: Mapping[str, SitePlan]) -> Findings:
    """A row a layer: its experts, tokens of the least and of the most chosen one, and what becomes of them."""
    rows, reasons = [], Counter[str]()
    for name, decision in decisions.items():
        about = decision.structure
        if "reason" in about:
            reasons[about["reason"]] += 1
            continue
        place = ".".join(name.partition("/")[0].split(".")[-3:])
        tokens = about.get("tokens")
        spread = f"{min(tokens)} … {max(tokens)}" if tokens else "-"
        rows.append((place, str(about["experts"]), spread, _what(about)))
    unseen = sum(decision.structure.get("unseen", 0) for decision in decisions.values())
    lines = [f"left as it is, {count} x: {reason}" for reason, count in reasons.most_common()]
    if unseen:
        lines.append(f"{unseen} experts were chosen by no token of the calibration data: give it more")
    return Findings(("layer", "experts", "tokens each", "becomes"), tuple(rows), tuple(lines))


def _what(about: Mapping[str, object]) -> str:
    pairs, groups, ranks = (about.get(key) for key in ("pairs", "groups", "ranks"))
    if isinstance(pairs, list):
        double = sum(len(pair) == 2 for pair in pairs)
        return f"{double} pairs, {len(pairs) - double} alone"
    if isinstance(groups, list):
        joined = sum(len(group) > 1 for group in groups)
        return f"{len(groups)} experts, {joined} of them merged"
    assert isinstance(ranks, list)
    return f"ranks {min(ranks)} … {max(ranks)}"
