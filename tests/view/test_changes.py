"""What a pass changed is judged by the nodes' identity, and told with the rewrite that did it."""

from __future__ import annotations

from fuseline.view.changes import changes, inside, trails
from tests.view.graphs import node


def action(number: int, **more: object) -> dict:
    told = {"number": number, "pass": 0, "match": [], "removed": [], "created": [], "replaced": [], "skipped": False}
    return {**told, **more}


def test_added_removed_rewired_and_retyped() -> None:
    before = [node(1), node(2, [1]), node(3, [2]), node(4, [3])]
    after = [node(1), node(5, [1]), node(3, [5]), node(4, [3], type="float64[2]")]
    found = changes(before, after)
    assert (found.added, found.removed, found.rewired, found.retyped) == ([5], [2], [3], [4])
    assert found.status() == {5: "a", 2: "r", 3: "w", 4: "t"}


def test_a_name_that_is_used_again_is_another_node() -> None:
    found = changes([node(1), node(2, [1])], [node(1), node(3, [1], name="n2")])
    assert (found.added, found.removed) == ([3], [2])


def test_what_keeps_its_number_and_gets_another_maker_is_unchanged() -> None:
    found = changes([node(1)], [node(1, makers=["fuse/pointwise"])])
    assert found.status() == {}


def region(identity: int, inner: list[dict], inputs: list[int]) -> dict:
    told = {"kind": "pointwise", "nodes": inner, "outputs": [inner[-1]["id"]]}
    return node(identity, inputs, op="call_module", target="pointwise_0", region=told)


def test_a_node_that_goes_into_a_region_is_moved() -> None:
    before = [node(1), node(2, [1]), node(3, [2]), node(4, [3])]
    copies = [node(6, [1], name="n2"), node(7, [6], name="n3")]
    after = [node(1), region(5, copies, [1]), node(4, [5])]
    found = changes(before, after, [action(1, removed=[2, 3], created=[5], replaced=[[3, 5]])])
    assert found.moved == {2: 6, 3: 7}
    assert (found.added, found.removed, found.rewired) == ([5], [], [4])
    assert found.status() == {5: "a", 6: "m", 7: "m", 4: "w"}


def test_what_a_region_has_anew_is_added() -> None:
    after = [node(1), region(5, [node(6, [1], name="other"), node(7, [6], name="n2")], [1])]
    found = changes([node(1), node(2, [1])], after, [action(1, removed=[2], created=[5])])
    assert (found.added, found.moved) == ([5, 6], {2: 7})


def test_trails_name_the_last_rewrite() -> None:
    record = {
        "nodes": [node(1), node(2), node(3), region(4, [node(5)], [])],
        "actions": [
            action(1, removed=[1], created=[2]),
            action(2, removed=[2], created=[3, 4]),
            action(3, created=[9], skipped=True),
        ],
    }
    made, gone = trails(record)
    assert made == {2: 1, 3: 2, 4: 2, 5: 2}
    assert gone == {1: 1, 2: 2}
    assert [i["id"] for i in inside(record["nodes"])] == [5]
