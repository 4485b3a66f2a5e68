"""Diff: programs are compared by structure; known edits are found exactly, and names never matter."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

import fuseline
from fuseline.compiler.debug.diff import Difference, diff
from fuseline.compiler.debug.diff_html import page
from fuseline.compiler.debug.diff_text import hunks, lines, stat, summary
from fuseline.compiler.expressions import Cast, Param
from fuseline.compiler.program import Program
from tests.helpers.models import Mlp, tiny_llama

aten = torch.ops.aten
UNARY = (aten.neg.default, aten.tanh.default, aten.sin.default, aten.exp.default)
BINARY = (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor)


def mlp() -> Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp(), (torch.randn(4, 8),))


def llama(layers: int) -> Program:
    return fuseline.capture(tiny_llama(num_hidden_layers=layers), (torch.arange(16)[None],), {"use_cache": False})


@pytest.fixture(scope="module")
def decoder() -> Program:
    return llama(4)


def nodes(program: Program, target: Any) -> list[Node]:
    return [n for n in program.graph.nodes if n.target is target]


def renamed(program: Program) -> Program:
    """A copy whose nodes are called the other way about."""
    result = program.copy()
    for number, node in enumerate(reversed(list(result.graph.nodes))):
        node._rename(f"renamed_{number}")
    return result


def found(difference: Difference) -> list[tuple[str, str]]:
    """Each change's kinds, and the op."""
    return [(" ".join(c.kinds), c.op) for c in difference.changes]


def test_a_program_is_the_same_as_itself_under_other_names() -> None:
    program = mlp()
    assert diff(program, program).same and diff(program, renamed(program)).same
    after, _ = fuseline.Pipeline("quantize{weights=int8},fuse").run(program)
    assert diff(after, renamed(after)).same


def test_two_captures_of_one_model_are_the_same_though_their_symbols_differ() -> None:
    def captured(dims: dict[int, Any]) -> Program:
        return fuseline.capture(Mlp(), (torch.randn(4, 8),), dynamic=(dims,))

    first, second = captured({0: torch.export.Dim("batch")}), captured({0: torch.export.Dim("rows")})
    assert diff(first, second).same
    static = captured({})
    assert {kind for kind, _ in found(diff(first, static))} == {"retyped"}


def test_a_swapped_op_is_one_change_and_nothing_downstream(decoder: Program) -> None:
    before, after = decoder, decoder.copy()
    swapped = nodes(after, aten.silu.default)[2]
    swapped.target = aten.relu.default
    (change,) = diff(before, after).changes
    assert change.kinds == ("replaced",) and change.op == "silu → relu"
    assert change.module == "model.layers.2.mlp.act_fn" and ".py:" in change.line
    assert change.before.name == swapped.name and change.before.value == change.after.value


@pytest.mark.slow
def test_one_op_of_one_layer_of_thirty() -> None:
    """Two graphs of some two thousand nodes, in less than a second."""
    before = llama(30)
    after = renamed(before)
    nodes(after, aten.silu.default)[17].target = aten.gelu.default
    started = time.process_time()
    difference = diff(before, after)
    seconds = time.process_time() - started
    assert found(difference) == [("replaced", "silu → gelu")]
    assert difference.changes[0].module == "model.layers.17.mlp.act_fn"
    assert len(before) > 1900 and seconds < 1.0


def test_another_argument_another_weight_another_input() -> None:
    before = mlp()
    after = before.copy()
    (mean,), (silu,) = nodes(after, aten.mean.dim), nodes(after, aten.silu.default)
    mean.args = (mean.args[0], [0], *mean.args[2:])
    weight = next(n for n in after.weights() if n.meta["weight"] == Param("gate.weight"))
    weight.meta["weight"] = Cast(Param("gate.weight"), torch.float32)
    silu.args = (nodes(after, aten.rsqrt.default)[0],)
    difference = diff(before, after)
    by_kind = {c.kinds: c for c in difference.changes}
    assert set(by_kind) == {("arguments",), ("weight",), ("rewired",)} and len(difference.changes) == 3
    assert by_kind[("arguments",)].details == ("dim: [-1] → [0]",)
    assert by_kind[("weight",)].details == ("gate.weight → cast(gate.weight)",)
    assert by_kind[("rewired",)].op == "silu" and by_kind[("rewired",)].details == ("input 0: linear → rsqrt",)


@pytest.mark.slow
def test_a_layer_more_is_that_layer_and_what_reads_it() -> None:
    difference = diff(llama(2), llama(3))
    added = [c for c in difference.changes if c.kinds == ("added",)]
    assert {c.module.split(".")[2] for c in added if c.module.startswith("model.layers.")} == {"2"}
    assert difference.counts() == {"added": len(added), "rewired": 2}
    assert [c.module for c in difference.changes if c not in added] == ["model.norm", "model.norm"]


def test_weights_that_changed_places_are_told_at_the_ops_that_read_them(decoder: Program) -> None:
    after = decoder.copy()
    keys, values = (
        next(n for n in nodes(after, aten.linear.default) if n.args[1].meta["weight"].name.endswith(f"2.self_attn.{w}"))
        for w in ("k_proj.weight", "v_proj.weight")
    )
    keys.args, values.args = (keys.args[0], values.args[1]), (values.args[0], keys.args[1])
    changes = diff(decoder, after).changes
    assert [(c.op, c.module.rsplit(".", 1)[1], c.details) for c in changes] == [
        ("linear", "k_proj", ("input 1: k_proj.weight → v_proj.weight",)),
        ("linear", "v_proj", ("input 1: v_proj.weight → k_proj.weight",)),
    ]


def test_a_changed_type_is_told_at_the_node_that_has_it() -> None:
    before = mlp()
    after = before.copy()
    (silu,) = nodes(after, aten.silu.default)
    silu.meta["val"] = silu.meta["val"].to(torch.bfloat16)
    (change,) = diff(before, after).changes
    assert change.kinds == ("retyped",) and change.details == ("float32[4, 16] → bfloat16[4, 16]",)


def test_a_default_that_is_written_is_no_difference() -> None:
    before = mlp()
    after = before.copy()
    for add in nodes(after, aten.add.Tensor):
        add.kwargs = {"alpha": 1}
    assert diff(before, after).same


def test_what_raise_does_to_a_norm() -> None:
    before = mlp()
    after, _ = fuseline.Pipeline("raise").run(before)
    difference = diff(before, after)
    assert ("replaced", "mul → fuseline.rms_norm") in found(difference)
    assert ("replaced", "mul → fuseline.glu") in found(difference)
    assert not difference.counts().keys() - {"removed", "replaced"}, "what reads them reads what took their place"
    norm = next(c for c in difference.changes if c.op == "mul → fuseline.rms_norm")
    assert norm.after.made_by == ("raise/RMSNorm",)


def test_regions_are_compared_inside() -> None:
    before = mlp()
    fused, _ = fuseline.Pipeline("fuse").run(before)
    grouped = diff(before, fused)
    assert not grouped.changes and {r.kind for r in grouped.regions} == {"added"} and not grouped.same
    after = fused.copy()
    call = next(n for n in after.graph.nodes if n.op == "call_module" and "linear" in n.target)
    region = next(
        m for _, m in after.module.named_children() if isinstance(m, GraphModule) and nodes_of(m, aten.silu.default)
    )
    assert call is not None
    nodes_of(region, aten.silu.default)[0].target = aten.tanh.default
    try:
        difference = diff(before, after)
        assert found(difference) == [("replaced", "silu → tanh")]
        assert difference.changes[0].after.region
    finally:  # a copy of a program shares its regions
        nodes_of(region, aten.tanh.default)[0].target = aten.silu.default


def nodes_of(module: GraphModule, target: Any) -> list[Node]:
    return [n for n in module.graph.nodes if n.target is target]


def test_reads_and_writes_that_change_places_are_told() -> None:
    class Cached(torch.nn.Module):
        def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
            seen = cache + 1.0
            cache.copy_(x)
            return seen

    before = fuseline.capture(Cached(), (torch.randn(3), torch.randn(3)))
    after = before.copy()
    (copy,), (add,) = nodes(after, aten.copy_.default), nodes(after, aten.add.Tensor)
    add.prepend(copy)
    assert [c.kinds for c in diff(before, after).changes] == [("moved",)]


def test_moved_provenance_is_kept_apart() -> None:
    before = mlp()
    after = before.copy()
    (silu,) = nodes(after, aten.silu.default)
    silu.meta["custom"] = {"fuseline": ("mine/Rule",)}
    difference = diff(before, after)
    assert difference.same and [c.op for c in difference.provenance] == ["silu"]
    assert difference.provenance[0].details == ("made by: - → mine/Rule",)


# --- Random graphs -----------------------------------------------------------------------------------------------


def random_program(steps: list[tuple[Any, ...]], outputs: int) -> Program:
    """A program of operations [4, 4] → [4, 4] over two inputs. A step: (op, numbers of earlier values, literal)."""
    mode = FakeTensorMode()
    with mode:
        fake = torch.empty(4, 4)
    graph = Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    for op, sources, literal in steps:
        args = [values[s % len(values)] for s in sources]
        factor = {} if literal is None else {"alpha": literal} if len(args) == 2 else {"other": literal}
        values.append(graph.call_function(op, tuple(args), factor))
    unused = [v for v in values[2:] if not v.users]
    graph.output((*unused, *values[-outputs:]))
    for node in values:
        node.meta["val"] = fake
    return Program(GraphModule(torch.nn.Module(), graph), mode, [0, 1], {})


@st.composite
def programs(draw: st.DrawFn, distinct: bool) -> Program:
    """Random programs; with `distinct`, every operation has a number of its own."""
    steps: list[tuple[Any, ...]] = []
    for number in range(draw(st.integers(2, 16))):
        sources = draw(st.lists(st.integers(0, 40), min_size=1, max_size=2))
        if distinct:
            op = aten.add.Scalar if len(sources) == 1 else aten.rsub.Tensor
            steps.append((op, sources, float(number) + 2.0))
        else:
            steps.append((draw(st.sampled_from(UNARY if len(sources) == 1 else BINARY)), sources, None))
    return random_program(steps, draw(st.integers(1, 2)))


def computing(program: Program) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "call_function"]


@settings(max_examples=60)
@given(programs(distinct=False))
def test_a_random_program_equals_itself(program: Program) -> None:
    assert diff(program, program).same
    assert diff(program, renamed(program)).same


def shuffled(program: Program, choose: random.Random) -> Program:
    """A copy whose nodes run in another order."""
    waiting = [n for n in program.graph.nodes if n.op != "output"]
    graph, values = Graph(), {}
    while waiting:
        node = choose.choice([n for n in waiting if all(i in values for i in n.all_input_nodes)])
        waiting.remove(node)
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(torch.fx.node.map_arg(program.graph.output_node().args[0], values.__getitem__))
    positions = [[p.name for p in program.placeholders].index(n.target) for n in graph.nodes if n.op == "placeholder"]
    return Program(GraphModule(torch.nn.Module(), graph), program.fake_mode, positions, {})


@settings(max_examples=100)
@given(programs(distinct=False), st.randoms(use_true_random=False))
def test_the_order_of_pure_nodes_is_no_difference(program: Program, choose: random.Random) -> None:
    assert diff(program, shuffled(program, choose)).same


@settings(max_examples=60)
@given(programs(distinct=False), programs(distinct=False))
def test_both_directions_mirror_each_other(first: Program, second: Program) -> None:
    mirror = {"added": "removed", "removed": "added"}

    def text(difference: Difference, turned: bool) -> set[Any]:
        return {
            (
                tuple(mirror.get(k, k) if turned else k for k in c.kinds),
                *((c.after, c.before) if turned else (c.before, c.after)),
            )
            for c in difference.changes
        }

    forth, back = diff(first, second), diff(second, first)
    assert text(forth, False) == text(back, True)
    assert forth.unchanged == back.unchanged


def swap(program: Program, node: Node, _: Node) -> set[tuple[str, str]]:
    """Another op of the same arguments."""
    others = {aten.add.Scalar: aten.mul.Scalar, aten.rsub.Tensor: aten.sub.Tensor}
    node.target = others.get(node.target, aten.cos.default if len(node.args) == 1 else aten.maximum.default)
    return {("replaced", node.name)}


def change_literal(program: Program, node: Node, _: Node) -> set[tuple[str, str]]:
    node.kwargs = dict.fromkeys(node.kwargs, -1.0)
    return {("arguments", node.name)}


def rewire(program: Program, node: Node, other: Node) -> set[tuple[str, str]]:
    if node.args[0] is other:
        return set()
    node.args = (other, *node.args[1:])
    return {("rewired", node.name)}


def insert(program: Program, node: Node, other: Node) -> set[tuple[str, str]]:
    """A new node between one input of a node and the node."""
    with program.graph.inserting_before(node):
        new = program.graph.call_function(aten.cos.default, (node.args[0],))
    new.meta = dict(node.meta)
    node.args = (new, *node.args[1:])
    return {("added", new.name), ("rewired", node.name)}


def bypass(program: Program, node: Node, other: Node) -> set[tuple[str, str]]:
    """The node goes; its users read what it read."""
    users = {user.name for user in node.users}
    source = node.args[0]
    name = node.name
    node.replace_all_uses_with(source)
    program.graph.erase_node(node)
    return {("removed", name)} | {("rewired", user) for user in users}


EDITS: tuple[Callable[[Program, Node, Node], set[tuple[str, str]]], ...] = (
    swap, change_literal, rewire, insert, bypass,
)  # fmt: skip


def edited(program: Program, choices: list[tuple[int, int, int]], most: int) -> tuple[Program, set[tuple[str, str]]]:
    """A copy with edits at nodes that are not neighbours of one another, and what a diff must say."""
    after, expected, near = program.copy(), set(), set()
    for kind, place, source in choices[:most]:
        nodes = computing(after)
        node = nodes[place % len(nodes)]
        neighbours = {node, *node.all_input_nodes, *node.users}
        neighbours |= {n for m in list(neighbours) for n in (*m.all_input_nodes, *m.users)}
        if near & neighbours:
            continue
        before = list(after.graph.nodes)
        other = before[source % before.index(node)]
        near |= neighbours | {other}
        expected |= EDITS[kind](after, node, other)
    return after, expected


@settings(max_examples=150)
@given(
    programs(distinct=True), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40), st.integers(0, 40)), max_size=4)
)
def test_known_edits_are_found_exactly(program: Program, choices: list[tuple[int, int, int]]) -> None:
    after, expected = edited(program, choices, 3)
    names = {}
    for change in diff(program, after).changes:
        shown = change.after or change.before
        names[shown.name] = " ".join(change.kinds)
    assert {(kind, name) for name, kind in names.items()} == expected


def test_hardly_ever_a_longer_explanation_than_the_edit() -> None:
    """Where operations are alike another explanation may be as short; in one graph of a hundred it may be longer."""
    choose = random.Random(0)
    longer = 0
    for _ in range(400):
        steps = []
        for _ in range(choose.randint(2, 16)):
            sources = [choose.randrange(40) for _ in range(choose.randint(1, 2))]
            steps.append((choose.choice(UNARY if len(sources) == 1 else BINARY), sources, None))
        program = random_program(steps, choose.randint(1, 2))
        edit = choose.choice((0, 2, 3, 4)), choose.randrange(40), choose.randrange(40)
        after, expected = edited(program, [edit], 1)
        longer += len(diff(program, after).changes) > len(expected)
    assert longer <= 4


# --- How it is shown ---------------------------------------------------------------------------------------------


def test_the_text_is_a_unified_diff_with_modules_and_lines() -> None:
    before = mlp()
    after = before.copy()
    nodes(after, aten.silu.default)[0].target = aten.tanh.default
    text = list(lines(diff(before, after), context=1))
    assert [kind for kind, _ in text] == ["context", "hunk", "removed", "added", "context"]
    assert re.fullmatch(r"@@ \(no module\)  models.py:\d+ @@", text[1][1])
    assert text[2][1].startswith("- silu = silu(linear)  float32[4, 16]")
    assert text[3][1].startswith("+ silu = tanh(linear)  float32[4, 16]")


def test_hunks_that_touch_are_one() -> None:
    before = mlp()
    after = before.copy()
    nodes(after, aten.silu.default)[0].target = aten.tanh.default
    nodes(after, aten.rsqrt.default)[0].target = aten.sqrt.default
    rows = diff(before, after).rows
    assert len(list(hunks(rows, 0))) == 2 and len(list(hunks(rows, 40))) == 1
    assert [row for hunk in hunks(rows, 40) for row in hunk] == rows


def test_counts_are_by_module_and_op(decoder: Program) -> None:
    before = decoder
    after, _ = fuseline.Pipeline("raise").run(before)
    difference = diff(before, after)
    modules = dict(stat(difference))
    assert "replaced 4 mul → fuseline.rms_norm" in modules["model.layers.*.input_layernorm"]
    assert summary(diff(before, before)).startswith("the same program: ")
    removed = difference.counts()["removed"]
    assert f"{removed} removed" in summary(difference)


def test_the_page_stands_alone(decoder: Program) -> None:
    before = decoder
    after, _ = fuseline.Pipeline("raise").run(before)
    difference = diff(before, after)
    text = page(difference, "<before>", "after")
    assert "&lt;before&gt;" in text and "<before>" not in text
    assert not re.search(r"(src|href)=|@import|https?://|url\(", text)
    assert text.count("data-kinds=") == len(difference.changes)
    assert text.count("<td") == text.count("</td>") and text.count("<tr") >= len(difference.rows)


def test_the_difference_as_data() -> None:
    import json

    before = mlp()
    after, _ = fuseline.Pipeline("raise").run(before)
    data = json.loads(json.dumps(diff(before, after).to_json()))
    assert data["same"] is False and data["nodes"]["before"] > data["nodes"]["after"]
    assert sum(data["counts"].values()) == len(data["changes"])
    first = data["changes"][0]
    assert set(first) == {"kinds", "module", "line", "op", "details", "before", "after"}
