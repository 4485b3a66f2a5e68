"""Graphs as a record tells them, written down by hand or drawn at random."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

State = dict[str, Any]


def node(identity: int, inputs: list[int] | None = None, module: str = "", **more: Any) -> State:
    """The state of a node that computes a tensor."""
    state = {
        "id": identity,
        "name": f"n{identity}",
        "op": "call_function",
        "target": "aten.add.Tensor",
        "args": ", ".join(f"n{i}" for i in inputs or []),
        "inputs": inputs or [],
        "type": "float32[2]",
        **more,
    }
    return {**state, "module": module} if module else state


@st.composite
def graphs(draw: st.DrawFn, nodes: int = 24) -> list[State]:
    """A graph in the order of its schedule, its nodes in modules that may be entered more than once; some regions."""
    names = st.sampled_from(["", "a", "a.0", "a.1", "a.2", "a.1.x", "b", "b.c.d"])
    states: list[State] = []
    free = 1
    for _ in range(draw(st.integers(1, nodes))):
        known = [s["id"] for s in states]
        inputs = draw(st.lists(st.sampled_from(known), max_size=3, unique=True)) if known else []
        one = node(free, inputs, draw(names))
        free += 1
        if draw(st.integers(0, 4)) == 0:
            inner = []
            for _ in range(draw(st.integers(1, 3))):
                reads = [*inputs, *(i["id"] for i in inner)]
                inner.append(
                    node(free, draw(st.lists(st.sampled_from(reads), max_size=2, unique=True)) if reads else [])
                )
                free += 1
            one |= {"op": "call_module", "target": f"region_{one['id']}"}
            one["region"] = {"kind": "pointwise", "nodes": inner, "outputs": [inner[-1]["id"]]}
        states.append(one)
    return states
