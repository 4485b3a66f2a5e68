"""What calibration found, for people: the sites of a kind together, by the last word of their path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ...compiler.framework import Findings
from ...compiler.plan import SitePlan


def findings(decisions: Mapping[str, SitePlan]) -> Findings:
    """A table of what was decided last, and lines.

    Before and after, means over the sites of a kind: of Σ|Δ|² / Σ|result|² of the products on the calibration data
    when they are rounded to nearest and as chosen; of smooth, the largest number that the products read. Where only
    formats or ranges were chosen, the table is theirs.
    """
    kinds: dict[str, list[dict[str, Any]]] = {}
    for site, decision in decisions.items():
        kinds.setdefault(site.rpartition("/")[0].rpartition(".")[2] or site, []).append(decision.structure)
    lines = tuple(_lines(decisions))
    for key, before in (("error", "error_nearest"), ("largest", "largest_before")):
        if rows := [_change(kind, have, before, key) for kind, ones in kinds.items() if (have := _with(ones, key))]:
            return Findings(("sites", "count", key, "after", "change"), tuple(rows), (*_formats(kinds), *lines))
    if rows := [(kind, *_chosen(have)) for kind, ones in kinds.items() if (have := _with(ones, "bytes"))]:
        return Findings(("sites", "count", "bits a weight", "formats"), tuple(rows), (_total(kinds), *lines))
    if rows := [_spread(kind, have) for kind, ones in kinds.items() if (have := _with(ones, "range"))]:
        return Findings(("sites", "count", "least", "largest"), tuple(rows), lines)
    return Findings(("sites", "count", "error", "after", "change"), (), lines)


def _with(ones: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [one for one in ones if key in one]


def _change(kind: str, ones: list[dict[str, Any]], before: str, after: str) -> tuple[str, ...]:
    was, now = (sum(one[key] for one in ones) / len(ones) for key in (before, after))
    return kind, str(len(ones)), f"{was:.3g}", f"{now:.3g}", f"{now / was - 1:+.1%}" if was else "-"


def _chosen(ones: list[dict[str, Any]]) -> tuple[str, str, str]:
    """How many, bits a weight, and how often each format."""
    formats = Counter(one["scheme"].partition(":")[0] for one in ones)
    said = ", ".join(f"{count} x {name}" for name, count in sorted(formats.items(), reverse=True))
    return str(len(ones)), f"{8 * _sum(ones, 'bytes') / _sum(ones, 'count'):.2f}", said


def _formats(kinds: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    """What `bits`, or a search among formats, chose, for a table that is about something else."""
    if any(_with(ones, "bytes") for ones in kinds.values()):
        rows = {kind: _chosen(have) for kind, ones in kinds.items() if (have := _with(ones, "bytes"))}
        return [_total(kinds), *(f"{kind}: {bits} bits a weight, {said}" for kind, (_, bits, said) in rows.items())]
    found = Counter(one["scheme"] for ones in kinds.values() for one in ones if "scheme" in one)
    read = Counter(one["activations"] for ones in kinds.values() for one in ones if "activations" in one)
    named = (("weights", found), ("activations", read))
    return [f"{what}: {', '.join(f'{n} x {s}' for s, n in of.most_common())}" for what, of in named if of]


def _total(kinds: Mapping[str, list[dict[str, Any]]]) -> str:
    ones = [one for have in kinds.values() for one in _with(have, "bytes")]
    size, count, cost = (_sum(ones, key) for key in ("bytes", "count", "cost"))
    return f"{size / 1e6:.4g} MB, {8 * size / count:.3f} bits a weight; expected to cost {cost:.3g}"


def _spread(kind: str, ones: list[dict[str, Any]]) -> tuple[str, ...]:
    low, high = (min(one["range"][0] for one in ones), max(one["range"][1] for one in ones))
    return kind, str(len(ones)), f"{low:.3g}", f"{high:.3g}"


def _sum(ones: list[dict[str, Any]], key: str) -> float:
    return float(sum(one[key] for one in ones))


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
