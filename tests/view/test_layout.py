"""Groups and rows: nothing is lost, nothing runs upwards, equal layers are drawn once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings

from fuseline.view.hierarchy import Group, Leaf, drawn, hierarchy
from fuseline.view.layout import crossings, layout
from tests.view.graphs import State, graphs, node


def tree(states: list[State]) -> Group:
    return hierarchy(drawn(states, {}))


def shape(group: Group) -> Any:
    """Nested labels, leaves as their numbers."""
    return [kid.id if isinstance(kid, Leaf) else {kid.label: shape(kid)} for kid in group.kids]


def check(data: dict[str, Any], leaves: list[Leaf]) -> None:
    """What holds for every layout."""
    groups = data["groups"]
    kids = [kid for group in groups for kid in group["kids"]]
    assert sorted(k for k in kids if k > 0) == sorted(leaf.id for leaf in leaves)
    assert sorted(k for k in kids if k < 0) == sorted(range(1 - len(groups), 0))
    members: dict[int, set[int]] = {}
    for position in range(len(groups) - 1, -1, -1):
        own = groups[position]["kids"]
        members[position] = {k for k in own if k > 0}.union(*(members[-k] for k in own if k < 0))
    for group in groups:
        rows = [[("lane", item[0]) if isinstance(item, list) else item for item in row] for row in group["rows"]]
        row_of = {item: r for r, row in enumerate(rows) for item in row if not isinstance(item, tuple)}
        assert sorted(row_of) == sorted(group["kids"])
        assert all(row for row in rows), "an empty row"
        lanes = [{item[1] for item in row if isinstance(item, tuple)} for row in rows]
        item_of = {leaf: kid for kid in group["kids"] for leaf in ([kid] if kid > 0 else members[-kid])}
        flows = {}
        for value, source, targets in group["edges"]:
            assert source == item_of.get(value)
            start = -1 if source is None else row_of[source]
            last = max(len(rows) if target is None else row_of[target] for target in targets)
            assert all(start < (len(rows) if t is None else row_of[t]) for t in targets), "a line that runs upwards"
            assert all(value in lanes[r] for r in range(start + 1, last)), "a lane with a gap"
            flows[value] = set(targets)
        assert sorted(group["ins"]) == sorted(v for v in flows if v not in item_of)
        assert sorted(group["outs"]) == sorted(v for v in flows if None in flows[v])
        for leaf in leaves:  # every value that is read has its line
            for value in leaf.inputs:
                reader, source = item_of.get(leaf.id), item_of.get(value)
                if reader is not None and reader != source:
                    assert reader in flows[value]
                if reader is None and source is not None:
                    assert None in flows[value]
    assert 0 in data["open"] and all(0 <= position < len(groups) for position in data["open"])


@given(graphs())
@settings(max_examples=150, deadline=None)
def test_every_layout_holds_the_graph(states: list[State]) -> None:
    leaves = drawn(states, {})
    check(layout(hierarchy(leaves)), leaves)


def test_groups_are_modules() -> None:
    found = tree([node(1), node(2, [1], "m.a"), node(3, [2], "m.a"), node(4, [3], "m.b"), node(5, [4], "m")])
    assert shape(found) == [1, {"m": [{"a": [2, 3]}, 4, 5]}]
    assert [kid.path for kid in found.kids if isinstance(kid, Group)] == ["m"]


def test_a_module_that_holds_one_module_alone_is_one_group() -> None:
    found = tree([node(1, [], "model.layers.0"), node(2, [1], "model.layers.0"), node(3, [2], "head")])
    assert shape(found) == [{"model.layers.0": [1, 2]}, 3]


def test_a_module_that_is_entered_again_is_another_group() -> None:
    """norm → linear → norm: one box for both calls would be above and below `linear` at once."""
    states = [node(1), node(2, [1], "norm"), node(3, [2], "norm"), node(4, [3], "fc"), node(5, [4], "norm"),
              node(6, [5], "norm")]  # fmt: skip
    assert shape(tree(states)) == [1, {"norm": [2, 3]}, 4, {"norm": [5, 6]}]


def layer(first: int, source: int, module: str, target: str = "aten.mul.Tensor") -> list[State]:
    return [node(first, [source], module), node(first + 1, [first, source], module, target=target)]


def layers(count: int, odd: int | None = None) -> list[State]:
    states = [node(1)]
    for i in range(count):
        target = "aten.div.Tensor" if i == odd else "aten.mul.Tensor"
        states += layer(10 * i + 10, states[-1]["id"], f"model.layers.{i}", target)
    return states


def test_equal_layers_are_folded_behind_their_first() -> None:
    found = tree(layers(6))
    (group,) = (kid for kid in found.kids if isinstance(kid, Group))
    assert [kid.label for kid in group.kids] == ["layers.0", "layers.1 … layers.5"]
    (rest,) = (kid for kid in group.kids if isinstance(kid, Group) and kid.kind == "equal")
    assert len(rest.kids) == 5 and len({kid.likeness for kid in rest.kids}) == 1


def test_a_layer_that_differs_stands_apart() -> None:
    (group,) = (kid for kid in tree(layers(9, odd=4)).kids if isinstance(kid, Group))
    assert [kid.label for kid in group.kids] == [
        "layers.0", "layers.1 … layers.3", "layers.4", "layers.5", "layers.6 … layers.8"
    ]  # fmt: skip


def test_a_changed_layer_is_not_like_the_others() -> None:
    states = layers(6)
    leaves = drawn(states, {31: "a"})
    (group,) = (kid for kid in hierarchy(leaves).kids if isinstance(kid, Group))
    assert "layers.2" in [kid.label for kid in group.kids] and "layers.1 … layers.5" not in str(group.kids)


def test_weights_sizes_and_elements_are_not_drawn() -> None:
    states = [
        node(1, op="placeholder", target="x"),
        node(2, op="get_attr", target="w"),
        node(3, [1], target="aten.sym_size.int", type="s0"),
        node(4, [1, 2, 3], type="(float32[2], float32[2])", target="aten.split.Tensor"),
        node(5, [4], target="getitem", args="n4, 1"),
        node(6, [5]),
    ]
    leaves = drawn(states, {})
    assert {leaf.id: leaf.inputs for leaf in leaves} == {1: [], 4: [1], 6: [4]}


def test_an_element_of_a_region_comes_from_the_node_that_computes_it() -> None:
    inner = [node(11, [1]), node(12, [11]), node(13, [1])]
    region = {"kind": "rows", "nodes": inner, "outputs": [12, 13]}
    states = [
        node(1),
        node(2, [1], op="call_module", target="rows_0", region=region, type="(float32[2], float32[2])"),
        node(3, [2], target="getitem", args="n2, 0"),
        node(4, [2], target="getitem", args="n2, 1"),
        node(5, [3], "m"),
        node(6, [4], "m"),
    ]
    assert {leaf.id: leaf.inputs for leaf in drawn(states, {}) if leaf.id in (5, 6)} == {5: [12], 6: [13]}


def test_a_line_over_many_rows_has_a_lane() -> None:
    data = layout(tree([node(1), node(2, [1]), node(3, [2]), node(4, [3, 1])]))
    assert data["groups"][0]["rows"] == [[1], [2, [1]], [3, [1]], [4]] or data["groups"][0]["rows"] == [
        [1], [[1], 2], [[1], 3], [4]
    ]  # fmt: skip


def test_crossings_are_counted_and_avoided() -> None:
    rows = [["a", "b"], ["x", "y"]]
    assert crossings(rows, [[("a", "y"), ("b", "x")]]) == 1
    assert crossings(rows, [[("a", "x"), ("b", "y")]]) == 0
    # two chains whose nodes alternate in the schedule: drawn as two columns
    states = [node(1), node(2), node(3, [2]), node(4, [1]), node(5, [4]), node(6, [3])]
    columns = layout(tree(states))["groups"][0]["rows"]
    assert columns in ([[1, 2], [4, 3], [5, 6]], [[2, 1], [3, 4], [6, 5]])


def test_what_reads_nothing_stands_above_its_reader() -> None:
    rows = layout(tree([node(9), node(1), node(2, [1]), node(3, [2]), node(4, [3, 9])]))["groups"][0]["rows"]
    assert rows.index([3, 9] if [3, 9] in rows else [9, 3]) == 2


@pytest.mark.parametrize("budget", [5, 40])
def test_what_is_open_at_first_fits_the_budget(budget: int) -> None:
    data = layout(tree(layers(12)), budget=budget)
    opened = [data["groups"][position] for position in data["open"]]
    assert sum(len(group["kids"]) for group in opened) - len(opened) + 1 <= max(budget, len(opened[0]["kids"]))
    assert all(group["kind"] in ("root", "module") for group in opened)


def test_a_graph_without_modules_of_two_thousand_nodes() -> None:
    """A chain with a residual every third node, without any module to hold it."""
    states = [node(1)]
    for i in range(2, 2001):
        states.append(node(i, [i - 1, i - 3] if i % 3 == 1 and i > 3 else [i - 1]))
    leaves = drawn(states, {})
    check(layout(hierarchy(leaves)), leaves)
