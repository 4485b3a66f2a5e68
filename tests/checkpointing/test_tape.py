"""What a plan takes for memory is what Inductor's fused kernels write: views through, products, scatters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from fuseline.compiler import ops
from fuseline.compiler.costs import Cost
from fuseline.compiler.machine import MACHINES
from fuseline.compiler.tape import Storage, Tape, execute, tape
from tests.helpers.joint import Traced


def tape_of(function: Callable[..., torch.Tensor], *shapes: tuple[int, ...], fused: bool = True) -> Tape:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.randn(s)) for s in shapes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x, *self.weights)

    return tape(Traced(Model(), torch.randn(8, 4), fused=fused).program())


def written(found: Tape) -> list[str]:
    """Names of the ops of whose results there are storages, in order."""
    return [getattr(found.nodes[s.owner].target, "_opname", "") for s in found.storages]


def node(found: Tape, op: str, place: int = 0) -> Node:
    return [n for n in found.nodes if getattr(n.target, "_opname", "") == op][place]


def test_what_a_product_reads_through_a_view_is_written() -> None:
    """A product reads its operands from memory, whatever shape they are given first."""

    def function(x: torch.Tensor, w: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ((x @ w).tanh().view(2, 4, 4).view(8, 4) @ v).sum()

    assert "tanh" in written(tape_of(function, (4, 4), (4, 3)))


def test_a_sum_onto_a_product_is_one_call_that_writes() -> None:
    """Gradients of a weight that several products read are added up one by one, not from all of them at the end."""

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return sum(((part @ w).tanh().sum() for part in x.split(2)), torch.zeros(()))

    found = tape_of(function, (4, 4))
    sums = [n for n in found.nodes if getattr(n.target, "_opname", "") == "add" and n.meta["val"].shape == (4, 4)]
    owners = {found.nodes[s.owner] for s in found.storages}
    assert len(sums) == 3 and owners.issuperset(sums)


def test_routed_experts_cost_what_their_op_says() -> None:
    def function(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        chosen = x.topk(2).indices
        return ops.moe(x, chosen, torch.ones_like(chosen, dtype=x.dtype), up, down).sum()

    found = tape_of(function, (4, 12, 4), (4, 4, 6))
    cost = found.costs[found.nodes.index(node(found, "moe"))]
    assert cost.products == 2 * (8 * 2) * (12 * 4 + 4 * 6) and cost.seconds(MACHINES["h100"], float) > 0


def test_a_scatter_writes_into_what_nobody_else_reads() -> None:
    def gathered(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros(4, 6).index_put((x.argmax(-1),), (x @ w[:, :4]).sin() @ w, accumulate=True)
        return (rows @ w.t()).sum()

    assert "index_put" in written(tape_of(gathered, (4, 6), fused=False))
    found = tape_of(gathered, (4, 6))
    assert "index_put" not in written(found)
    into, put = node(found, "zeros"), node(found, "index_put")
    assert found.holds[found.nodes.index(put)] == found.holds[found.nodes.index(into)] != ()


def test_what_is_made_again_is_not_alive_between_two_waits() -> None:
    """n is made of k, which is kept, for g1 and once more for g3; k is there until then."""
    graph = torch.fx.Graph()
    names = ("k", "n", "r", "g1", "g2", "g3")
    reads = {"k": "", "n": "k", "r": "k", "g1": "n", "g2": "r", "g3": "n"}
    nodes: dict[str, Node] = {}
    for name in names:
        nodes[name] = graph.call_function(torch.neg, tuple(nodes[n] for n in reads[name].split()))
        nodes[name].meta["val"] = torch.empty(4, device="meta")
    places = [[names.index(n) for n in reads[name].split()] for name in names]
    one = [(i,) for i in range(6)]
    storages = [Storage(i, i, nodes[name], [j for j in range(6) if i in places[j]]) for i, name in enumerate(names)]
    found = Tape(
        list(nodes.values()), [0, 1, 2], [3, 4, 5], [tuple(p) for p in places], [list(o) for o in one], one, storages,
        [16] * 6, [Cost(bytes=16)] * 6, frozenset(), frozenset({5}), [tuple(p) for p in places],
    )  # fmt: skip
    held = execute(found, {0})
    assert [names[i] for i in held.backward.steps] == ["n", "g1", "r", "g2", "g3"]
    assert held.backward.counts[:, 1].tolist() == [1, 1, 1, 1, 1]
    assert held.backward.counts[:, 0].tolist() == [1, 1, 1, 0, 0]
    found.made_of = {1: 0}
    made = execute(found, {0})
    assert made.backward.steps == held.backward.steps
    assert made.backward.counts[:, 1].tolist() == [1, 1, 0, 0, 1]
    assert made.backward.counts[:, 0].tolist() == [1, 1, 1, 1, 1]
    assert (made.backward.counts[:, 2:] == held.backward.counts[:, 2:]).all()
