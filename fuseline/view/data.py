"""What the page is drawn from: the record, what changed between its stages, and the layout of each stage and diff."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any

from .changes import Changes, State, changes, inside, stage_states, trails
from .hierarchy import drawn, hierarchy
from .layout import layout

VERSION = 1


def page_data(
    record: Mapping[str, Any], title: str, directory: str | None = None, step: Callable[[str], None] = lambda what: None
) -> dict[str, Any]:
    """The data of a page.

    Args:
        record: what `fuseline.compiler.observe.Record` has written.
        title: what was run, for the page's head.
        directory: where the dumped stages are, to name them in commands; None when there are none.
        step: told of each piece of work, for a progress bar; there are `steps(record)` of them.

    Keys: version, title, directory, pipeline, torch, symbols, captured_error, ended, failure, stopped, passes, actions,
    kernels, excerpts, stacks as in the record; files (path → a short name); nodes (every distinct state, those inside
    regions among them, `region.nodes` being positions); stages (with `nodes` as positions, and `layout`); diffs (one
    for each pass that ended or failed: `Changes`, with the `layout` of both stages at once); made, gone (id → action).
    """
    nodes, position = _flat(record)
    stages, diffs = [], []
    for number, stage in enumerate(record["stages"]):
        step(stage["name"])
        states = stage_states(record, number)
        drawing = layout(hierarchy(drawn(states, {})))
        stages.append({**stage, "nodes": [position[id(s)] for s in states], "layout": drawing})
    for number in range(len(record["stages"]) - 1):
        step(f"diff {record['stages'][number + 1]['name']}")
        diffs.append(_diff(record, number))
    made, gone = trails(record)
    kept = ("pipeline", "torch", "symbols", "captured_error", "ended", "failure", "passes", "actions", "kernels")
    return {
        "version": VERSION,
        "title": title,
        "directory": directory,
        **{key: record[key] for key in (*kept, "excerpts", "stacks")},
        "stopped": record.get("stopped"),
        "files": short_names(_places(record)),
        "nodes": nodes,
        "stages": stages,
        "diffs": diffs,
        "made": made,
        "gone": gone,
    }


def steps(record: Mapping[str, Any]) -> int:
    """How many stages and diffs are laid out."""
    return 2 * len(record["stages"]) - 1


def _diff(record: Mapping[str, Any], number: int) -> dict[str, Any]:
    before, after = stage_states(record, number), stage_states(record, number + 1)
    found = changes(before, after, [a for a in record["actions"] if a["pass"] == number and not a["skipped"]])
    status = found.status()
    tree = hierarchy(drawn(both(before, after, found), status))
    return {**found.to_json(), "layout": layout(tree, weight=dict.fromkeys(status, 1))}


def both(before: list[State], after: list[State], found: Changes) -> list[State]:
    """The nodes of two stages in one order: what was removed stands where it was, before what then followed it."""
    gone = set(found.removed)
    waiting = [state for state in before if state["id"] in gone]
    kept = {state["id"]: place for place, state in enumerate(before)}
    merged: list[State] = []
    taken = 0
    for state in after:
        place = kept.get(state["id"])
        while place is not None and taken < len(waiting) and kept[waiting[taken]["id"]] < place:
            merged.append(waiting[taken])
            taken += 1
        merged.append(state)
    return merged[:-1] + waiting[taken:] + merged[-1:] if taken < len(waiting) else merged


def _flat(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], dict[int, int]]:
    """All states in one list, and where each is in it, by identity."""
    nodes: list[dict[str, Any]] = []
    position: dict[int, int] = {}
    for state in record["nodes"]:
        for one in (*inside([state]), state):
            position[id(one)] = len(nodes)
            nodes.append(dict(one))
    for state in nodes:
        if "region" in state:
            region = state["region"]
            state["region"] = {**region, "nodes": [position[id(inner)] for inner in region["nodes"]]}
            for inner in state["region"]["nodes"]:
                nodes[inner]["inside"] = state["id"]
    return nodes, position


def _places(record: Mapping[str, Any]) -> list[str]:
    found = [*record["excerpts"], *(frame.partition(" in ")[0] for stack in record["stacks"] for frame in stack)]
    return [place.rpartition(":")[0] for place in found]


def short_names(paths: list[str]) -> dict[str, str]:
    """Each file's name, with as many of its folders as it takes to tell it from the others; `__init__.py` with one."""
    parts = {path: PurePath(path).parts for path in paths}
    found: dict[str, str] = {}
    for path, names in parts.items():
        length = 1 + (names[-1:] == ("__init__.py",))
        while length < len(names) and any(
            other != path and theirs[-length:] == names[-length:] for other, theirs in parts.items()
        ):
            length += 1
        found[path] = "/".join(names[-length:])
    return found
