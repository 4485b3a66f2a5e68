"""What a plan takes for memory is what Inductor's fused kernels write: views through, products, scatters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from fuseline.compiler import ops
from fuseline.compiler.machine import MACHINES
from fuseline.compiler.tape import Tape, tape
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
