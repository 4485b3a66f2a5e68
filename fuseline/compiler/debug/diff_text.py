"""A difference as text: hunks like a unified diff's, and counts by module and op."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from .diff import Change, Difference, Row
from .shown import Shown


def hunks(rows: Sequence[Row], context: int = 2) -> Iterator[Sequence[Row]]:
    """Runs of rows around changes, with `context` unchanged rows before and after each."""
    changed = [i for i, row in enumerate(rows) if row.change is not None]
    start = end = None
    for i in changed:
        if start is None or end is None:
            start, end = max(0, i - context), i + context + 1
        elif i - context <= end:
            end = i + context + 1
        else:
            yield rows[start:end]
            start, end = i - context, i + context + 1
    if start is not None:
        yield rows[start:end]


def lines(difference: Difference, context: int = 2) -> Iterator[tuple[str, str]]:
    """Lines of text, each with what it is: "hunk", "removed", "added", "context", "note"."""
    for hunk in hunks(difference.rows, context):
        place = None
        for row in hunk:
            if row.change is not None and (here := _place(row.change)) != place:
                place = here
                yield "hunk", f"@@ {place} @@"
            yield from _row(row)
    for text in region_lines(difference):
        yield "note", text


def _row(row: Row) -> Iterator[tuple[str, str]]:
    change = row.change
    if change is None:
        shown = row.after or row.before
        assert shown is not None
        yield "context", f"  {_node(shown)}"
        return
    if change.before is not None:
        yield "removed", f"- {_node(change.before, True)}"
    if change.after is not None:
        yield "added", f"+ {_node(change.after, True)}"
    overload = change.kinds[0] == "replaced" and "→" not in change.op
    kinds = [k for k in change.kinds if k not in ("added", "removed", "replaced") or overload]
    if kinds and kinds != ["arguments"]:  # which the two lines show
        yield "note", f"    {', '.join(kinds)}: {'; '.join(change.details)}"


def _node(shown: Shown, whole: bool = False) -> str:
    text = f"{shown.name} = {shown.text}"
    if not whole:
        return text
    made = f"  by {', '.join(shown.made_by)}" if shown.made_by else ""
    return f"{text}  {shown.value}{made}"


def _place(change: Change) -> str:
    where = change.module or "(no module)"
    return f"{where}  {short_line(change.line)}".rstrip()


def short_line(line: str | None) -> str:
    """`modeling.py:174`, without its folder."""
    return re.split(r"[/\\]", line)[-1] if line else ""


def region_lines(difference: Difference) -> Iterator[str]:
    """`regions added: 14 linear, 7 pointwise`."""
    for kind in ("removed", "added"):
        found = Counter(r.what for r in difference.regions if r.kind == kind)
        if found:
            yield f"regions {kind}: {', '.join(f'{count} {what}' for what, count in found.most_common())}"
    for region in difference.regions:
        if region.kind == "changed":
            name = region.before if region.before == region.after else f"{region.before} → {region.after}"
            yield f"region {name}: {region.gained} nodes joined, {region.lost} left"


def summary(difference: Difference) -> str:
    """One line: how many nodes, how many changes of each kind."""
    nodes = f"{difference.nodes_before} → {difference.nodes_after} nodes"
    if difference.same:
        return f"the same program: {nodes}"
    counts = [f"{count} {kind}" for kind, count in {"unchanged": difference.unchanged, **difference.counts()}.items()]
    return f"{nodes}: {', '.join(counts)}{'; other regions' if difference.regions else ''}"


def stat(difference: Difference) -> list[tuple[str, str]]:
    """Module, and what changed in it; a number in a module's path becomes `*`."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    for change in difference.changes:
        module = re.sub(r"(?<![^.])\d+(?![^.])", "*", change.module)
        found.setdefault(module, Counter())[" ".join(change.kinds), change.op] += 1
    return [(module, _counted(counts)) for module, counts in found.items()]


def _counted(counts: Counter[tuple[str, str]]) -> str:
    """`removed 8 mul, 4 neg; added 4 fuseline.rotary`."""
    by_kind: dict[str, list[str]] = {}
    for (kinds, op), count in counts.most_common():
        by_kind.setdefault(kinds, []).append(f"{count} {op}")
    return "; ".join(f"{kinds} {', '.join(ops)}" for kinds, ops in by_kind.items())
