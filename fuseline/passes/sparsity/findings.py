"""What `rsparse` decided, for people: the groups of a kind together, and what was measured."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...compiler.framework import Findings
from ...compiler.plan import SitePlan


def findings(decisions: Mapping[str, SitePlan]) -> Findings:
    """A row for the groups of a kind: channels kept, least, mean and most; branches, their mean rank, and the share of
    the groups' cost to second order that they take away."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for decision in decisions.values():
        if "kind" in decision.structure:
            kinds.setdefault(decision.structure["kind"], []).append(decision.structure)
    rows = []
    for kind, ones in kinds.items():
        kept = [one["fraction"] for one in ones]
        ranked = [one for one in ones if one["rank"]]
        rank = f"{sum(one['rank'] for one in ranked) / len(ranked):.0f}" if ranked else "-"
        gain = _gain(ones)
        spread = f"{min(kept):.0%} … {max(kept):.0%}"
        rows.append((kind, str(len(ones)), f"{sum(kept) / len(kept):.1%}", spread, str(len(ranked)), rank, gain))
    headings = ("inputs of", "count", "kept", "least … most", "branches", "rank", "gain")
    return Findings(headings, tuple(rows), tuple(_lines(decisions)))


def _gain(ones: list[dict[str, Any]]) -> str:
    if not any(one["rank"] and "cost" in one for one in ones):
        return "-"
    with_it, without = (sum(one.get(key, 0.0) for one in ones) for key in ("cost", "cost_channels"))
    return f"{1 - with_it / without:.1%}" if without else "-"


def _lines(decisions: Mapping[str, SitePlan]) -> list[str]:
    structures = [decision.structure for decision in decisions.values()]
    model = decisions[""].structure
    lines = [f"read: {model['read']:.1%} of the sparse products' bytes"]
    if model["dense_bytes"]:
        lines[0] += f", beside {model['dense_bytes'] / 1e6:.3g} MB of products that stay dense"
    for name, loss in model.get("measured", {}).items():
        lines.append(f"loss on the search's data, {name}: {loss:.4g}")
    if "held_out" in model:
        lines += _kept(model["held_out"])
    reasons = Counter(one["reason"] for one in structures if "reason" in one)
    lines += [f"left dense, {count} x: {reason}" for reason, count in reasons.most_common()]
    turned = sum(bool(one.get("rotated")) for one in structures)
    if turned:
        lines.append(
            f"{turned} inputs are rotated by weights: their channels are alike in size, so dropping them costs more"
        )
    return lines


def _kept(held_out: Mapping[str, Any]) -> list[str]:
    """Which candidate a search kept, and why: `decide.Decision._settled`."""
    if held_out["calls"] < 2:
        return ["kept: sensitivity; no two calls are left to confirm a candidate on: give more, or fewer for calls="]
    if "ratio" not in held_out:
        return ["kept: sensitivity; the search found none that is better"]
    ratio, margin = math.expm1(held_out["ratio"]), held_out["margin"]
    found = f"{ratio:+.1%} on {held_out['calls']} calls that the search did not see, ±{margin:.1%} of noise"
    if held_out["kept"] == "searched":
        return [f"kept: searched, {found}"]
    return [f"kept: sensitivity; the best of the search is {found}"]
