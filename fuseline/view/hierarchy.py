"""A graph as nested groups: by module, by region, and runs of equal layers as one.

Weights, sizes and the picking of tuples' elements are not drawn: what reads them shows them. A module that is entered
again after it was left becomes a second group, so that no group both feeds another and is fed by it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby

from .changes import State

EQUAL = 3  # so many equal layers in a row are drawn as the first, and one group of the others


@dataclass(eq=False)
class Leaf:
    """A node that is drawn. inputs: the drawn nodes whose values it reads."""

    id: int
    path: tuple[str, ...]
    kind: str  # what makes two nodes alike: op, type, and whether it changed
    inputs: list[int]
    region: int | None = None


@dataclass(eq=False)
class Group:
    """A module, a region, a run of equal layers, or the whole graph. kids: in the order of the schedule."""

    label: str
    path: str
    kind: str  # "root", "module", "region" or "equal"
    kids: list[Group | Leaf] = field(default_factory=list)
    node: int | None = None  # the call, when it is a region
    likeness: int = 0  # equal for groups that hold the same

    def leaves(self) -> list[Leaf]:
        return [leaf for kid in self.kids for leaf in ([kid] if isinstance(kid, Leaf) else kid.leaves())]


def is_drawn(state: State) -> bool:
    """Whether a node is drawn, and not only listed by what reads it."""
    if state["op"] == "get_attr" or state["target"] == "getitem":
        return False
    return state["op"] == "output" or "type" not in state or "[" in state["type"]


def drawn(states: Sequence[State], status: Mapping[int, str]) -> list[Leaf]:
    """The leaves of a stage; regions of several nodes give one leaf for each, with `region` set.

    Args:
        status: what changed, by node; a changed node is not like one that didn't.
    """
    by_id = {s["id"]: s for s in states}
    resolve = _resolver(by_id)
    leaves = []
    for state in states:
        inner = _inside(state)
        path = tuple(state.get("module", "").split(".")) if state.get("module") else ()
        for one in inner or ([state] if is_drawn(state) else []):
            reads = [by for i in one["inputs"] for by in resolve(i)]
            target = "" if one["op"] == "call_module" else one["target"]
            kind = f"{target} {one.get('type')} {status.get(one['id'], '')}"
            region = state["id"] if inner else None
            leaves.append(Leaf(one["id"], path, kind, list(dict.fromkeys(reads)), region))
    present, seen = {leaf.id for leaf in leaves}, set()
    for leaf in leaves:  # what would run backwards (in a graph of two stages at once) is not drawn
        leaf.inputs = [i for i in leaf.inputs if i in present and i in seen]
        seen.add(leaf.id)
    return leaves


def _inside(state: State) -> list[State]:
    """The drawn nodes of a region, where it has several."""
    nodes = [n for n in state["region"]["nodes"] if is_drawn(n)] if "region" in state else []
    return nodes if len(nodes) > 1 else []


def _resolver(by_id: Mapping[int, State]) -> Callable[[int], list[int]]:
    """For a node that is read, the drawn nodes that its value comes from."""
    hidden = {n["id"]: n for s in by_id.values() if "region" in s for n in s["region"]["nodes"] if not is_drawn(n)}

    def resolve(identity: int) -> list[int]:
        state = by_id.get(identity) or hidden.get(identity)
        if state is None or (is_drawn(state) and not _inside(state)):
            return [identity]
        if _inside(state):
            return [one for output in state["region"]["outputs"] for one in resolve(output)]
        if state["target"] != "getitem":
            return []
        source = by_id.get(state["inputs"][0])
        which = re.search(r"(\d+)$", state["args"])
        if source is not None and which is not None and _inside(source):
            outputs = source["region"]["outputs"]
            return resolve(outputs[int(which[1])]) if int(which[1]) < len(outputs) else []
        return resolve(state["inputs"][0])

    return resolve


def hierarchy(leaves: Sequence[Leaf]) -> Group:
    """The groups of a graph. Each group of one is that one; names are joined where a module holds one module alone."""
    root = Group("", "", "root")
    root.kids = _build(list(leaves), 0, "")
    counts: dict[tuple[object, ...], int] = {}
    _compare(root, counts)
    _fold(root)
    return root


def _build(leaves: list[Leaf], depth: int, path: str) -> list[Group | Leaf]:
    """The kids of a group whose leaves have their first `depth` names in common."""
    items: list[tuple[str | int | None, list[Leaf]]] = []
    open_items: dict[str | int, int] = {}
    item_of: dict[int, int] = {}
    follows: list[set[int]] = []
    for unit in _units(leaves):
        key: str | int | None = unit[0].path[depth] if len(unit[0].path) > depth else unit[0].region
        sources = {item_of[i] for leaf in unit for i in leaf.inputs if i in item_of}
        found = open_items.get(key) if key is not None else None
        if found is not None and _reaches(found, sources - {found}, follows):
            found = None  # the module was left, and is entered again
        if found is None:
            found = len(items)
            items.append((key, []))
            follows.append(set())
            if key is not None:
                open_items[key] = found
        items[found][1].extend(unit)
        item_of.update((leaf.id, found) for leaf in unit)
        for source in sources - {found}:
            follows[source].add(found)
    return [_item(key, inside, depth, path) for key, inside in items]


def _units(leaves: Sequence[Leaf]) -> Iterable[list[Leaf]]:
    """The leaves one by one, those of a region together: no module takes a part of a region."""
    for region, together in groupby(leaves, key=lambda leaf: leaf.region):
        if region is None:
            yield from ([leaf] for leaf in together)
        else:
            yield list(together)


def _reaches(start: int, targets: set[int], follows: Sequence[set[int]]) -> bool:
    """Whether some target lies behind `start`."""
    seen, pending = {start}, [start]
    while pending and targets:
        for after in follows[pending.pop()] - seen:
            if after in targets:
                return True
            seen.add(after)
            pending.append(after)
    return False


def _item(key: str | int | None, leaves: list[Leaf], depth: int, path: str) -> Group | Leaf:
    if len(leaves) == 1:
        return leaves[0]
    if not isinstance(key, str):
        kids: list[Group | Leaf] = list(leaves)
        return Group("", path, "region", kids, node=leaves[0].region)
    inner = f"{path}.{key}" if path else key
    label = f"{path.rpartition('.')[2]}.{key}" if path and key.isdigit() else key
    group = Group(label, inner, "module", _build(leaves, depth + 1, inner))
    only = group.kids[0] if len(group.kids) == 1 else None
    if isinstance(only, Group):  # model holds nothing but layers: model.layers
        if only.kind == "module" and not only.label.startswith(f"{key}."):
            only.label = f"{key}.{only.label}"
        return only
    return group


def _compare(group: Group, counts: dict[tuple[object, ...], int]) -> None:
    """Sets `likeness`: equal where groups hold the same ops, wired alike; values from outside count by their order."""
    for kid in group.kids:
        if isinstance(kid, Group):
            _compare(kid, counts)
    places: dict[int, int] = {}
    shape: list[object] = [group.kind]
    for leaf in group.leaves():
        shape.append((leaf.kind, tuple(places.setdefault(i, ~len(places)) for i in leaf.inputs)))
        places[leaf.id] = len(shape)
    shape += [kid.likeness if isinstance(kid, Group) else 0 for kid in group.kids]
    group.likeness = counts.setdefault(tuple(shape), len(counts) + 1)


def _fold(group: Group) -> None:
    """Puts runs of equal numbered modules into one group each, their first left outside."""
    for kid in group.kids:
        if isinstance(kid, Group):
            _fold(kid)
    runs: list[list[Group | Leaf]] = []
    for kid in group.kids:
        last = runs[-1][-1] if runs else None
        if _is_layer(kid) and last is not None and _is_layer(last) and kid.likeness == last.likeness:
            runs[-1].append(kid)
        else:
            runs.append([kid])
    kids: list[Group | Leaf] = []
    for run in runs:
        rest = run[1:]
        if len(run) < EQUAL or not _convex(group, rest):
            kids += run
            continue
        first, last = rest[0], rest[-1]
        assert isinstance(first, Group) and isinstance(last, Group)
        label = f"{first.label} … {last.label}"
        kids += [run[0], Group(label, f"{first.path}…{last.label}", "equal", rest, likeness=first.likeness)]
    group.kids = kids


def _is_layer(kid: Group | Leaf) -> bool:
    return isinstance(kid, Group) and kid.kind == "module" and kid.label.rpartition(".")[2].isdigit()


def _convex(group: Group, members: Iterable[Group | Leaf]) -> bool:
    """Whether no path leaves these kids and comes back."""
    ids = [{leaf.id for leaf in ([kid] if isinstance(kid, Leaf) else kid.leaves())} for kid in group.kids]
    chosen = {position for position, kid in enumerate(group.kids) if any(kid is m for m in members)}
    item_of = {identity: position for position, inside in enumerate(ids) for identity in inside}
    follows: list[set[int]] = [set() for _ in ids]
    for leaf in group.leaves():
        for i in leaf.inputs:
            if i in item_of:
                follows[item_of[i]].add(item_of[leaf.id])
    outside = reduce(operator.or_, (follows[m] for m in chosen), set()) - chosen
    return not any(_reaches(one, chosen, follows) for one in outside)
