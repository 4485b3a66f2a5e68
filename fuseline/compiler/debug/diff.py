"""Diff: what one program has that another has not, matched by structure.

    difference = diff(before, after)
    difference.same                     nothing but names differs
    difference.changes                  each node that was added, removed, replaced, rewired, re-typed, …

A node that took another's place (other op, same users) is *replaced*; its users are not *rewired*, for what they read
stands where it stood. Everything else is judged node by node: a change is not passed on to what is computed from it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..compat import symbolic_expression
from ..program import Program
from ..provenance import makers, module_path, source_line
from .inlined import Inlined, Item, inlined
from .matching import match
from .shown import Shown, differing, name_text, op_text, show, value_text

KINDS = ("removed", "added", "replaced", "rewired", "arguments", "weight", "retyped", "moved")


@dataclass(frozen=True)
class Change:
    """One difference. kinds: of `KINDS`, one or several; details: what differs, for a person to read."""

    kinds: tuple[str, ...]
    before: Shown | None
    after: Shown | None
    details: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        return next((s.module for s in (self.after, self.before) if s is not None and s.module), "")

    @property
    def line(self) -> str | None:
        """The user's line."""
        return next((s.line for s in (self.after, self.before) if s is not None and s.line), None)

    @property
    def op(self) -> str:
        """The op; `silu → gelu` where one took the other's place."""
        names = [shown.op for shown in (self.before, self.after) if shown is not None]
        return " → ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class Row:
    """A line of both programs side by side; `change` is None where nothing changed."""

    before: Shown | None
    after: Shown | None
    change: Change | None


@dataclass(frozen=True)
class Regrouped:
    """A region that was added, removed, or has other nodes in it."""

    kind: str  # added, removed, changed
    before: str | None
    after: str | None
    what: str  # linear, pointwise, attention
    nodes: int
    gained: int = 0
    lost: int = 0


@dataclass
class Difference:
    """What `diff` found; rows hold both programs, in order."""

    rows: list[Row]
    regions: list[Regrouped] = field(default_factory=list)
    provenance: list[Change] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0

    @property
    def changes(self) -> list[Change]:
        return [row.change for row in self.rows if row.change is not None]

    @property
    def same(self) -> bool:
        return not self.changes and not self.regions

    @property
    def unchanged(self) -> int:
        return sum(row.change is None for row in self.rows)

    def counts(self) -> dict[str, int]:
        """How many changes there are of each kind; a node may be rewired and re-typed at once."""
        found = Counter(kind for change in self.changes for kind in change.kinds)
        return {kind: found[kind] for kind in KINDS if found[kind]}

    def to_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "nodes": {"before": self.nodes_before, "after": self.nodes_after, "unchanged": self.unchanged},
            "counts": self.counts(),
            "changes": [_change_json(c) for c in self.changes],
            "regions": [vars(r) for r in self.regions],
            "provenance": [_change_json(c) for c in self.provenance],
        }


def diff(before: Program, after: Program) -> Difference:
    """Compares two programs node by node; names never matter."""
    first, second = inlined(before), inlined(after)
    pairs = match(first.items, second.items)
    compared = _Compared(before, after, first, second, pairs)
    changes = compared.changes()
    rows = list(compared.rows(changes))
    provenance = list(compared.provenance())
    return Difference(rows, list(compared.regions()), provenance, len(first.items), len(second.items))


class _Compared:
    def __init__(self, before: Program, after: Program, first: Inlined, second: Inlined, pairs: dict[Item, Item]):
        self.first, self.second, self.pairs = first, second, pairs
        self.back = {y: x for x, y in pairs.items()}
        self.mutated = {n for p in (before, after) for n in p.placeholders if n.name in p.mutated}
        self.theirs = set(second.items)
        self.symbols = self._symbols()
        self.known: dict[Item, Shown] = {}

    def changes(self) -> dict[Item, Change]:
        """By item, of either side."""
        found: dict[Item, Change] = {}
        for item in self.first.items:
            if item not in self.pairs:
                found[item] = Change(("removed",), self.show(item), None)
        for item in self.second.items:
            if item not in self.back:
                found[item] = Change(("added",), None, self.show(item))
        out_of_order = self._out_of_order([(a, b) for a, b in self.pairs.items() if a.effect or b.effect])
        for a, b in self.pairs.items():
            kinds, details = self._compare(a, b)
            if a in out_of_order:
                kinds.append("moved")
                details.append("it runs at another place among the nodes with effects")
            if kinds:
                found[a] = found[b] = Change(tuple(kinds), self.show(a), self.show(b), tuple(details))
        return found

    def _compare(self, a: Item, b: Item) -> tuple[list[str], list[str]]:
        kinds, details = [], []
        if a.kind != b.kind:
            kinds.append("replaced")
            names = (op_text(a), op_text(b)) if op_text(a) != op_text(b) else (a.kind, b.kind)
            details.append(" → ".join(names))
        else:
            if a.label != b.label:
                kinds.append("weight" if a.is_weight else "arguments")
                details += differing(a, b)
            if [self.pairs.get(i) for i in a.inputs] != b.inputs:
                kinds.append("rewired")
                details += self._rewired(a, b)
        was, now = self.value(a), self.value(b)
        if was != now and a.kind != "output":
            kinds.append("retyped")
            details.append(f"{was} → {now}")
        return kinds, details

    def _rewired(self, a: Item, b: Item) -> Iterator[str]:
        if len(a.inputs) != len(b.inputs):
            yield f"{len(a.inputs)} inputs → {len(b.inputs)} inputs"
            return
        for position, (x, y) in enumerate(zip(a.inputs, b.inputs, strict=True)):
            if self.pairs.get(x) is not y:
                yield f"input {position}: {name_text(x)} → {name_text(y)}"

    def _out_of_order(self, pairs: Sequence[tuple[Item, Item]]) -> set[Item]:
        pairs = sorted(((a, b) for a, b in pairs if a.inputs), key=lambda pair: pair[0].index)
        kept = _longest_increasing([b.index for _, b in pairs])
        return {a for position, (a, _) in enumerate(pairs) if position not in kept}

    def provenance(self) -> Iterator[Change]:
        """Pairs whose module, line or makers differ."""
        for a, b in self.pairs.items():
            details = [
                f"{what}: {was or '-'} → {now or '-'}"
                for what, was, now in (
                    ("module", module_path(a.node), module_path(b.node)),
                    ("line", source_line(a.node), source_line(b.node)),
                    ("made by", ", ".join(makers(a.node)), ", ".join(makers(b.node))),
                )
                if was != now
            ]
            if details:
                yield Change(("provenance",), self.show(a), self.show(b), tuple(details))

    def regions(self) -> Iterator[Regrouped]:
        """Regions by what they hold: the one that shares most nodes with another is that other."""
        shared = Counter((a.region, b.region) for a, b in self.pairs.items() if a.region and b.region)
        partner: dict[str, str] = {}
        back: dict[str, str] = {}
        for (x, y), _ in shared.most_common():
            if x not in partner and y not in back:
                partner[x], back[y] = y, x
        inside = {x: {self.pairs.get(i) for i in r.members} for x, r in self.first.regions.items()}
        for x, region in self.first.regions.items():
            if x not in partner:
                yield Regrouped("removed", x, None, region.kind, len(region.members))
        for y, region in self.second.regions.items():
            x = back.get(y, "")
            if not x:
                yield Regrouped("added", None, y, region.kind, len(region.members))
                continue
            gained = sum(i not in inside[x] and i in self.back for i in region.members)
            lost = sum(i is not None and i.region != y for i in inside[x])
            if gained or lost or self.first.regions[x].kind != region.kind:
                yield Regrouped("changed", x, y, region.kind, len(region.members), gained, lost)

    def rows(self, changes: dict[Item, Change]) -> Iterator[Row]:
        """Both programs in order: what stands in the same order on both sides anchors the rest."""
        pairs = sorted(self.pairs.items(), key=lambda pair: pair[0].index)
        kept = _longest_increasing([b.index for _, b in pairs])
        anchors = {pairs[i][0] for i in kept}
        left = iter([i for i in self.first.items if i in anchors or i not in self.pairs])
        for item in self.second.items:
            partner = self.back.get(item)
            if partner in anchors:
                for gone in left:
                    if gone is partner:
                        break
                    yield Row(self.show(gone), None, changes[gone])
            before = None if partner is None else self.show(partner)
            yield Row(before, self.show(item), changes.get(item))
        for gone in left:
            yield Row(self.show(gone), None, changes[gone])

    def show(self, item: Item) -> Shown:
        if item not in self.known:
            self.known[item] = show(item, self.value(item))
        return self.known[item]

    def value(self, item: Item) -> str:
        value = item.node.meta.get("val")
        text = value_text(value, self.symbols if item in self.theirs else {})
        device = str(value.device) if isinstance(value, torch.Tensor) and value.device.type != "cpu" else ""
        return " ".join(filter(None, (text, device, "written" if item.node in self.mutated else "")))

    def _symbols(self) -> dict[Any, Any]:
        """Sizes of the second program by the names that they have in the first: two captures name them apart."""
        found: dict[Any, Any] = {}
        for a, b in self.pairs.items():
            if a.kind == "input" == b.kind:
                for was, now in zip(_sizes(a), _sizes(b), strict=False):
                    if getattr(was, "is_Symbol", False) and getattr(now, "is_Symbol", False):
                        if now not in found and was not in found.values():
                            found[now] = was
        return {now: was for now, was in found.items() if now != was}


def _sizes(item: Item) -> list[Any]:
    value = item.node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return [symbolic_expression(s) for s in value.shape]
    return [symbolic_expression(value)]


def _longest_increasing(numbers: Sequence[int]) -> set[int]:
    """Positions of a longest increasing subsequence."""
    tails: list[int] = []
    at: list[int] = []
    before: list[int] = []
    for position, number in enumerate(numbers):
        place = bisect_left(tails, number)
        before.append(at[place - 1] if place else -1)
        tails[place : place + 1] = [number]
        at[place : place + 1] = [position]
    kept: set[int] = set()
    position = at[-1] if at else -1
    while position >= 0:
        kept.add(position)
        position = before[position]
    return kept


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "kinds": list(change.kinds),
        "module": change.module,
        "line": change.line,
        "op": change.op,
        "details": list(change.details),
        "before": None if change.before is None else vars(change.before),
        "after": None if change.after is None else vars(change.after),
    }
