"""Order: what must run before what, writes included; sets of nodes that may run as one; a stable sort."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fuseline.compiler.order import Partition, Reachability, sort, touches_written, writes
from fuseline.compiler.program import Program
from fuseline.compiler.structure import same_structure, structural_hash
from tests.helpers.models import traced
from tests.strategies import networks


def nodes(program: Program) -> dict[str, torch.fx.Node]:
    return {n.name: n for n in program.graph.nodes}


def diamond(x):
    a = torch.neg(x)
    b = torch.exp(a)
    c = torch.sin(b)
    return a + c


def test_a_set_around_a_detour_does_not_fit() -> None:
    program = traced(diamond, torch.randn(3))
    n, partition = nodes(program), Partition(Reachability(program.graph))
    assert not partition.fits({n["neg"], n["add"]})
    assert partition.fits({n["neg"], n["exp"], n["sin"], n["add"]})
    assert partition.fits({n["exp"], n["sin"]})


def test_two_sets_that_wait_for_each_other_do_not_fit() -> None:
    def crossed(x, y):
        a, b = torch.neg(x), torch.cos(y)
        return a + torch.exp(b), b + torch.sin(a)

    program = traced(crossed, torch.randn(3), torch.randn(3))
    n, partition = nodes(program), Partition(Reachability(program.graph))
    first, second = {n["neg"], n["add"]}, {n["cos"], n["add_1"]}
    assert partition.fits(first) and partition.fits(second)
    partition.put("first", first)
    second_with_both = {n["cos"], n["exp"], n["sin"], n["add_1"]}
    assert not partition.fits(second_with_both)  # exp feeds the first set, sin needs it
    assert partition.fits({n["cos"], n["exp"]})


def test_a_set_replaces_its_own_earlier_form() -> None:
    program = traced(diamond, torch.randn(3))
    n, partition = nodes(program), Partition(Reachability(program.graph))
    partition.put("it", {n["exp"]})
    assert partition.fits({n["exp"], n["sin"]}, "it")


def test_a_read_after_a_write_waits_for_it() -> None:
    def function(x, cache):
        before = cache + 1
        cache.copy_(x)
        return before, cache * 2

    program = traced(function, torch.randn(3), torch.randn(3))
    n, reach = nodes(program), Reachability(program.graph)
    write = next(m for m in program.graph.nodes if writes(m))
    assert touches_written(n["add"]) and touches_written(n["mul"])
    assert reach.depends(write, n["add"]) and reach.depends(n["mul"], write) and not reach.depends(n["add"], write)


def test_nothing_crosses_a_change_of_grad_mode() -> None:
    def function(x):
        a = torch.neg(x)
        with torch.no_grad():
            b = torch.exp(x)
        return a + b

    class Module(torch.nn.Module):
        forward = staticmethod(function)

    import fuseline

    x = torch.randn(3, requires_grad=True)
    torch.compiler.reset()
    found = []

    def backend(graph_module, inputs):
        found.append(fuseline.compiler.capture.from_dynamo(graph_module, inputs))
        return graph_module.forward

    torch.compile(function, backend=backend)(x)
    n, partition = nodes(found[0]), Partition(Reachability(found[0].graph))
    assert not partition.fits({n["neg"], n["exp"]}) and not partition.fits({n["exp"], n["add"]})


def check_sorted(network: torch.nn.Module, seed: int) -> None:
    x, cache = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    program = traced(network, x, cache)
    expected = program.to_module()(x, cache.clone())
    before = structural_hash(program)
    sort(program.graph)
    assert structural_hash(program) == before  # already in order: nothing moves
    # Nodes that touch no written storage are thrown about; sorting brings them back into an order that runs.
    free = [n for n in program.graph.nodes if n.op == "call_function" and not touches_written(n)]
    anchor = next(n for n in program.graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in random.Random(seed).sample(free, len(free)):
        if node is not anchor:
            anchor.prepend(node)
    sort(program.graph)
    program.module.recompile()
    program.graph.lint()
    actual = program.to_module()(x, cache.clone())
    assert all(map(torch.equal, actual, expected))


@settings(max_examples=30)
@given(networks(), st.integers(0, 1000))
def test_sorting_a_shuffled_graph_keeps_its_meaning(network: torch.nn.Module, seed: int) -> None:
    check_sorted(network, seed)


@pytest.mark.slow
@settings(max_examples=100)
@given(networks(), st.integers(0, 1000))
def test_more_shuffled_graphs_keep_their_meaning(network: torch.nn.Module, seed: int) -> None:
    check_sorted(network, seed)


def test_a_cycle_is_an_error() -> None:
    program = traced(diamond, torch.randn(3))
    n = nodes(program)
    n["neg"].args = (n["sin"],)
    with pytest.raises(ValueError, match="the graph has a cycle"):
        sort(program.graph)


def test_structure_ignores_names_and_sees_the_rest() -> None:
    x = torch.randn(3)
    first = traced(lambda x: torch.neg(x) + 1, x)
    renamed = traced(lambda y: torch.neg(y) + 1, x)
    assert same_structure(first, renamed) and structural_hash(first) == structural_hash(renamed)
    for other in (lambda x: torch.neg(x) + 2, lambda x: torch.abs(x) + 1, lambda x: torch.neg(x) + 1 + 1):
        assert not same_structure(first, traced(other, x))
    assert not same_structure(first, traced(lambda x: torch.neg(x) + 1, torch.randn(4)))
    assert not same_structure(first, traced(lambda x: torch.neg(x) + 1, x.double()))
