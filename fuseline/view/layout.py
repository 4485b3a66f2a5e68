"""Layered drawing of nested groups (Sugiyama, Tagawa and Toda, 1981): which row each item is in, and its place there.

Each group is laid out by itself. Values that enter and leave it do so through ports at its top and bottom; a value
that is read rows below has a lane through the rows between, shared by all who read it, so no line crosses a box.
Places in pixels are the page's: they depend on which groups are open.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .hierarchy import Group, Leaf

SWEEPS = 8

Item = int | tuple[int, int]
"""A kid, by its position among the kids; or the lane of a value through one row, as (value, row)."""


@dataclass
class Edges:
    """A value within one group: from a kid (None: from outside) to kids, and whether it leaves the group."""

    value: int
    source: int | None
    targets: list[int] = field(default_factory=list)
    leaves: bool = False


def layout(root: Group, budget: int = 60, weight: dict[int, int] | None = None) -> dict[str, Any]:
    """All groups of a graph as data; the root is the first.

    Args:
        budget: about how many boxes are to be seen before anything is opened by hand.
        weight: what makes a leaf worth seeing; 1 for each when None.

    Each group has label, path, kind, node (of a region), count, likeness, and
    kids: leaves as their ids, groups as −position; rows: kids and lanes ([value]) from left to right; ins, outs: the
    values at its ports, from left to right; edges: [value, kid or null, [kid or null, …]], null meaning a port.
    `open` lists the groups that are open at first.
    """
    groups: list[Group] = []
    _number(root, groups)
    codes = {id(group): -position for position, group in enumerate(groups)}
    read_outside: dict[int, list[int]] = {}
    for leaf in root.leaves():
        for value in leaf.inputs:
            read_outside.setdefault(value, []).append(leaf.id)
    found = [_group_data(group, codes, read_outside) for group in groups]
    return {"groups": found, "open": _open_at_first(root, codes, budget, weight)}


def _number(group: Group, groups: list[Group]) -> None:
    groups.append(group)
    for kid in group.kids:
        if isinstance(kid, Group):
            _number(kid, groups)


def _group_data(group: Group, codes: dict[int, int], readers: dict[int, list[int]]) -> dict[str, Any]:
    edges = group_edges(group, readers)
    ranks = ranked(len(group.kids), edges)
    rows, ins, outs = ordered(ranks, edges)
    code = [kid.id if isinstance(kid, Leaf) else codes[id(kid)] for kid in group.kids]
    data: dict[str, Any] = {
        "label": group.label,
        "path": group.path,
        "kind": group.kind,
        "count": len(group.leaves()),
        "likeness": group.likeness,
        "kids": code,
        "rows": [[code[item] if isinstance(item, int) else [item[0]] for item in row] for row in rows],
        "ins": ins,
        "outs": outs,
        "edges": [
            [e.value, None if e.source is None else code[e.source], [*(code[t] for t in e.targets), *[None] * e.leaves]]
            for e in edges
        ],
    }
    return data if group.node is None else {**data, "node": group.node}


def group_edges(group: Group, readers: dict[int, list[int]]) -> list[Edges]:
    """The values that flow between a group's kids, into it and out of it, in the order of the schedule."""
    item_of: dict[int, int] = {}
    for position, kid in enumerate(group.kids):
        for leaf in [kid] if isinstance(kid, Leaf) else kid.leaves():
            item_of[leaf.id] = position
    found: dict[int, Edges] = {}
    for leaf in group.leaves():
        for value in leaf.inputs:
            source = item_of.get(value)
            if source == item_of[leaf.id]:
                continue
            edge = found.setdefault(value, Edges(value, source))
            if item_of[leaf.id] not in edge.targets:
                edge.targets.append(item_of[leaf.id])
    for value, position in item_of.items():
        if any(reader not in item_of for reader in readers.get(value, ())):
            found.setdefault(value, Edges(value, position)).leaves = True
    return list(found.values())


def ranked(count: int, edges: Sequence[Edges]) -> list[int]:
    """Each kid's row: below all it reads; one that reads nothing stands right above the first that reads it."""
    after: list[set[int]] = [set() for _ in range(count)]
    waiting = [0] * count
    for edge in edges:
        for target in edge.targets:
            if edge.source is not None and target not in after[edge.source]:
                after[edge.source].add(target)
                waiting[target] += 1
    ready = [kid for kid in range(count) if not waiting[kid]]
    entered = {target for edge in edges if edge.source is None for target in edge.targets}
    free = [kid for kid in ready if kid not in entered]
    ranks = [0] * count
    for kid in ready:  # grows as it goes: a topological order
        for target in after[kid]:
            ranks[target] = max(ranks[target], ranks[kid] + 1)
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    for kid in free:
        if after[kid]:
            ranks[kid] = min(ranks[target] for target in after[kid]) - 1
    return ranks


def ordered(ranks: Sequence[int], edges: Sequence[Edges]) -> tuple[list[list[Item]], list[int], list[int]]:
    """Rows of kids and lanes, and the values at the upper and the lower ports, with few crossings (barycentres)."""
    height = max(ranks, default=-1) + 1
    rows: list[list[Item]] = [[] for _ in range(height + 2)]  # the first and the last are the ports
    links: list[list[tuple[Item, Item]]] = [[] for _ in range(height + 1)]
    for kid, rank in enumerate(ranks):
        rows[rank + 1].append(kid)
    for edge in edges:
        first = 0 if edge.source is None else ranks[edge.source] + 1
        ends: dict[int, list[Item]] = {}
        for target in edge.targets:
            ends.setdefault(ranks[target] + 1, []).append(target)
        if edge.leaves:
            ends.setdefault(height + 1, []).append((edge.value, height + 1))
            rows[height + 1].append((edge.value, height + 1))
        lane: Item = (edge.value, 0) if edge.source is None else edge.source
        if edge.source is None:
            rows[0].append(lane)
        last = max(ends, default=first)
        for row in range(first + 1, last + 1):
            links[row - 1] += [(lane, end) for end in ends.get(row, ())]
            if row < last:
                links[row - 1].append((lane, (edge.value, row)))
                lane = (edge.value, row)
                rows[row].append(lane)
    best = [list(row) for row in rows]
    fewest = crossings(best, links)
    for sweep in range(SWEEPS if fewest else 0):
        _sweep(rows, links, downwards=sweep % 2 == 0)
        now = crossings(rows, links)
        if now < fewest:
            best, fewest = [list(row) for row in rows], now
    ports = [[item[0] for item in row if isinstance(item, tuple)] for row in (best[0], best[-1])]
    return best[1:-1], ports[0], ports[1]


def _sweep(rows: list[list[Item]], links: Sequence[Sequence[tuple[Item, Item]]], downwards: bool) -> None:
    """Orders each row by the mean place of its neighbours in the row before; one without any keeps its place."""
    sequence = range(1, len(rows)) if downwards else range(len(rows) - 2, -1, -1)
    for row in sequence:
        fixed = rows[row - 1] if downwards else rows[row + 1]
        place = {item: float(position) for position, item in enumerate(fixed)}
        sums: dict[Item, tuple[float, int]] = {}
        for upper, lower in links[row - 1] if downwards else links[row]:
            mine, theirs = (lower, upper) if downwards else (upper, lower)
            total, count = sums.get(mine, (0.0, 0))
            sums[mine] = total + place[theirs], count + 1
        scale = (len(fixed) or 1) / (len(rows[row]) or 1)
        wanted = {
            item: sums[item][0] / sums[item][1] if item in sums else position * scale
            for position, item in enumerate(rows[row])
        }
        rows[row].sort(key=wanted.__getitem__)


def crossings(rows: Sequence[Sequence[Item]], links: Iterable[Sequence[tuple[Item, Item]]]) -> int:
    """How many pairs of links cross between neighbouring rows."""
    total = 0
    for row, between in enumerate(links):
        upper = {item: position for position, item in enumerate(rows[row])}
        lower = {item: position for position, item in enumerate(rows[row + 1])}
        seen: list[int] = []
        for _, end in sorted((upper[a], lower[b]) for a, b in between):
            total += len(seen) - bisect_right(seen, end)
            insort(seen, end)
    return total


def _open_at_first(root: Group, codes: dict[int, int], budget: int, weight: dict[int, int] | None) -> list[int]:
    """Opens the heaviest groups, as long as what is seen stays within the budget; of equal layers only the first."""
    worth = lambda group: sum(1 if weight is None else weight.get(leaf.id, 0) for leaf in group.leaves())
    chosen, seen, shut = [root], len(root.kids), set()
    while True:
        closed = [
            kid
            for group in chosen
            for kid in group.kids
            if isinstance(kid, Group) and kid.kind == "module" and kid not in chosen and id(kid) not in shut
        ]
        closed = [kid for kid in closed if worth(kid)]
        if not closed:
            return [-codes[id(group)] for group in chosen]
        heaviest = max(closed, key=worth)
        if seen + len(heaviest.kids) - 1 > budget:
            shut.add(id(heaviest))
        else:
            seen += len(heaviest.kids) - 1
            chosen.append(heaviest)
