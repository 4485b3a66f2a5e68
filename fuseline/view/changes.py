"""What a pass changed between two neighbouring stages, by the identity of the nodes, and which rewrite did it.

added, removed     nodes that one of the stages alone has
moved              pairs: a node that went into a region, and its copy there
rewired            nodes that stayed and read other nodes now, or take other arguments
retyped            nodes that stayed and have another type
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

State = Mapping[str, Any]
"""One entry of a record's `nodes`."""


@dataclass
class Changes:
    """Ids of nodes, in the order of the graph that holds them."""

    added: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    moved: dict[int, int] = field(default_factory=dict)
    rewired: list[int] = field(default_factory=list)
    retyped: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "moved": [list(pair) for pair in self.moved.items()]}

    def status(self) -> dict[int, str]:
        """A letter for each node that changed: a, r, m (its copy in the region), w, t."""
        found = {**dict.fromkeys(self.rewired, "w"), **dict.fromkeys(self.retyped, "t")}
        found |= {**dict.fromkeys(self.added, "a"), **dict.fromkeys(self.removed, "r")}
        for outside, inside in self.moved.items():
            found.pop(outside, None)
            found[inside] = "m"
        return found


def stage_states(record: Mapping[str, Any], stage: int) -> list[State]:
    """The states of a stage's nodes, in graph order."""
    return [record["nodes"][position] for position in record["stages"][stage]["nodes"]]


def inside(states: Iterable[State]) -> list[State]:
    """The nodes in the regions among `states`."""
    return [inner for state in states if "region" in state for inner in state["region"]["nodes"]]


def changes(before: Sequence[State], after: Sequence[State], actions: Iterable[Mapping[str, Any]] = ()) -> Changes:
    """What changed from one stage to the next; `actions` are the rewrites between them."""
    old, new = {s["id"]: s for s in before}, {s["id"]: s for s in after}
    found = Changes(removed=[i for i in old if i not in new])
    moved = _moved(old, new, actions)
    known = {i["id"] for i in inside(before)}
    for identity, state in new.items():
        was = old.get(identity)
        if was is None:
            found.added.append(identity)
            found.added += [i["id"] for i in inside([state]) if i["id"] not in known]
        elif was != state:
            if was.get("type") != state.get("type"):
                found.retyped.append(identity)
            elif (was["inputs"], was["args"], was["target"]) != (state["inputs"], state["args"], state["target"]):
                found.rewired.append(identity)
    gone = set(found.removed)
    found.moved = {outer: inner for outer, inner in moved.items() if outer in gone}
    copies = set(found.moved.values())
    found.added = [i for i in found.added if i not in copies]
    found.removed = [i for i in found.removed if i not in found.moved]
    return found


def _moved(
    before: Mapping[int, State], after: Mapping[int, State], actions: Iterable[Mapping[str, Any]]
) -> dict[int, int]:
    """Nodes that a rewrite took out of the graph, and the copies of them in the region that it made.

    A copy has the name of its original, and names are unique in a graph.
    """
    found: dict[int, int] = {}
    for action in actions:
        for made in action["created"]:
            region = after.get(made, {}).get("region")
            if region is not None:
                copies = {inner["name"]: inner["id"] for inner in region["nodes"]}
                names = {i: before[i]["name"] for i in action["removed"] if i in before}
                found.update((i, copies[name]) for i, name in names.items() if name in copies)
    return found


def trails(record: Mapping[str, Any]) -> tuple[dict[int, int], dict[int, int]]:
    """Which rewrite made a node, and which took it out of the graph: id → the action's number, twice.

    The nodes of a region are made by the rewrite that made the region.
    """
    made: dict[int, int] = {}
    gone: dict[int, int] = {}
    regions = {s["id"]: [i["id"] for i in s["region"]["nodes"]] for s in record["nodes"] if "region" in s}
    for action in record["actions"]:
        if action["skipped"]:
            continue
        gone.update((i, action["number"]) for i in action["removed"])
        for identity in action["created"]:
            for one in (identity, *regions.get(identity, ())):
                made[one] = action["number"]
    return made, gone
