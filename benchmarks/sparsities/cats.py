"""CATS as a peer: channels of a gated unit whose activated gate is small are dropped, the gate itself stays dense.

Source: CATS (Lee et al., 2024): the gate's product is dense, the columns of `up` and `down` where |silu(g)| is below a
threshold are not read. Attention stays dense, so there is a budget below which it cannot go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from fuseline.compiler import ops
from fuseline.compiler.program import Program
from fuseline.passes.sparsity.samples import ROWS
from fuseline.passes.sparsity.trial import Masked


class GateOnly(Masked):
    """A program whose gated units drop channels below a threshold each. kept: what `observe` found, by unit."""

    def __init__(self, program: Program, thresholds: Mapping[Node, float] | None = None, dense: float = 0.0):
        super().__init__(program, dense=dense)
        self.thresholds = dict(thresholds or {})
        self.seen: dict[Node, list[torch.Tensor]] | None = None

    def run_node(self, node: Node) -> Any:
        if node.target is not ops.glu.overload or (self.seen is None and node not in self.thresholds):
            return super().run_node(node)
        (gate, up, *rest), _ = self.fetch_args_kwargs_from_env(node)
        activated = ops.glu.naive(gate, torch.ones_like(up), *rest)
        if self.seen is not None:
            rows = activated.abs().reshape(-1, activated.shape[-1])
            self.seen.setdefault(node, []).append(rows[:: max(1, len(rows) * len(self.data) // ROWS)])
            return activated * up
        dropped = activated.abs() <= self.thresholds[node]
        dropped[..., : int(gate.shape[-2] * self.dense), :] = False
        return activated.masked_fill(dropped, 0) * up

    @torch.no_grad()
    def observe(self, data: Sequence[Sequence[Any]]) -> dict[Node, torch.Tensor]:
        """Sizes of the activated gates, sorted, by unit."""
        self.data, self.seen = data, {}
        for flat in data:
            self(flat)
        found, self.seen = self.seen, None
        return {node: torch.cat(sizes).flatten().sort().values for node, sizes in found.items()}


def fraction(budget: float, total: int, gated: int) -> float:
    """The share of a gated unit's channels for a budget; total: bytes of all products, gated: of `up` and `down`.

    Raises:
        ValueError: what stays dense is more than the budget.
    """
    left = budget * total - (total - gated)
    if left <= 0:
        raise ValueError(f"attention and gates are dense: {(total - gated) / total:.1%} of the bytes at the least")
    return left / gated
