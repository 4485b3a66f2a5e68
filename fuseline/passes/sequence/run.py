"""The program, run once more under a tracer with every value placed: what comes out is one rank's program.

Shapes are computed anew by running, never edited. A value is a plain tensor (all of it on every rank), `Sharded` or
`Partial`; ops on plain tensors run as they are, all others by their rule. What a rule needs in another placement is
moved there once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...compiler.inliner import Inliner
from ...compiler.provenance import source_line
from .collectives import Group
from .heads import Heads
from .placement import Partial, Shard, Sharded, is_one
from .refusals import refusal
from .rules import find
from .rules._define import value


class Run(Inliner):
    """One rank's run.

    values: what each node stands for here; starts: nodes from which on a sequence is cut, and how.
    """

    def __init__(self, module: GraphModule, group: Group, starts: dict[Node, Shard], gathered: Sequence[str] = ()):
        super().__init__(module)
        self.group, self.starts, self.gathered = group, starts, gathered
        self.values: dict[Node, Any] = {}
        self.weights: dict[Node, torch.Tensor] = {}
        self.cut: dict[Node, Shard] = {}
        self._moved: dict[tuple[Any, ...], torch.Tensor] = {}
        self.rings: Group | None = None  # where keys and values go around; within a member of it heads are exchanged
        self.inner: Group | None = None
        self.started: list[Node] = []
        self.collected: list[Node] = []

    def run_node(self, n: Node) -> Any:
        with self._set_current_node(n):
            result = self._step(n)
        self.values[n] = result
        if isinstance(result, Sharded):
            self.cut[n] = result.shard
        return result

    def _step(self, n: Node) -> Any:
        if n.op == "get_attr":
            return self.weights[n]
        if n.op == "placeholder":
            return super().placeholder(n.target, (), {})
        if n.op == "output":
            return n.args[0]
        placed = [i for i in n.all_input_nodes if _is_placed(self.values[i])]
        for i in placed:
            if isinstance(self.values[i], Partial):
                self.values[i] = self.group.all_reduce(self.values[i].tensor)
        placed = [i for i in placed if _is_placed(self.values[i])]
        rule = find(n.target)
        if not placed and n not in self.starts:
            return self._as_it_is(n)
        if n.op != "call_function" or rule is None:
            return self.refuse(n, "no rule says what it does to a sequence that is cut")
        if not placed:
            self.started.append(n)
        return rule.forward(self, n)

    def _as_it_is(self, n: Node) -> Any:
        args, kwargs = torch.fx.node.map_arg((n.args, n.kwargs), lambda i: self.values[i])
        return getattr(self, n.op)(n.target, args, kwargs)

    # What rules ask for.

    def shard_of(self, node: Node) -> Shard:
        return self.values[node].shard

    def call(self, node: Node, local: dict[Node, torch.Tensor]) -> Any:
        """The node's op with some inputs replaced by these tensors."""
        args, kwargs = torch.fx.node.map_arg(
            (node.args, node.kwargs), lambda i: local[i] if i in local else self.values[i]
        )
        return self.call_function(node.target, args, kwargs)

    def local(self, source: Node, to: Sequence[int | None], shard: Shard, node: Node) -> torch.Tensor:
        """What a rank needs of an input for its block `shard` of a result; `to` tells which dimension goes with which.
        Inputs that are broadcast along the sequence, or not read along it, are needed whole."""
        found = self.values[source]
        if isinstance(found, Sharded):
            if to[found.shard.dim] == shard.dim and found.shard.at(shard.dim).is_like(shard):
                return found.tensor
            return self.whole(source)
        for d, goes in enumerate(to):
            if goes == shard.dim and not is_one(value(source).shape[d]):
                there = shard.at(d)
                return self._once(source, there, lambda: self.group.take(found, there))  # noqa: B023
        return found

    def whole(self, source: Node) -> torch.Tensor:
        """All of a value, gathered if it is cut."""
        found = self.values[source]
        if isinstance(found, Sharded):
            self.collected.append(source)
            return self._once(source, None, lambda: self.group.gather(found.tensor, found.shard))
        return found

    def _once(self, source: Node, shard: Shard | None, move: Callable[[], torch.Tensor]) -> torch.Tensor:
        key = (source, torch.is_grad_enabled(), shard and (shard.dim, str(shard.outer), str(shard.inner)))
        if key not in self._moved:
            self._moved[key] = move()
        return self._moved[key]

    def masked(self, found: Sharded) -> torch.Tensor:
        """The block with zeros at positions that do not exist."""
        if found.shard.axis.even:
            return found.tensor
        return torch.where(self.group.valid(found.shard, found.tensor.dim(), found.tensor.device), found.tensor, 0)

    def repeated(self, found: Sharded) -> torch.Tensor:
        """The block with a position of the sequence at those that do not exist, one that this rank holds or the first
        of all."""
        if found.shard.axis.even:
            return found.tensor
        dim, axis = found.shard.dim, found.shard.axis
        parts = found.tensor.unflatten(dim, (found.shard.outer, axis.block, found.shard.inner))
        firsts = self.group.all_gather(parts.narrow(dim + 1, 0, 1))[0]
        inside = (self.group.positions(axis, found.tensor.device) < axis.length).view(
            [-1 if d == dim + 1 else 1 for d in range(parts.dim())]
        )
        return torch.where(inside, parts, firsts).reshape(found.tensor.shape)

    def mask_of_heads(self, mask: Node | None, heads: Heads) -> torch.Tensor | None:
        """A mask [B, H or 1, S, T] for this rank's heads."""
        if mask is None:
            return None
        x = self.whole(mask)
        if x.dim() < 3 or is_one(x.shape[-3]):
            return x
        return x.index_select(x.dim() - 3, heads.queries_of(self.group.rank, x.device))

    def refuse(self, node: Node, reason: str) -> Any:
        """Stops with the node's line and what can be done; or gathers, where the user asked for that at this op."""
        name = getattr(node.target, "_opname", str(node.target))
        if name in self.gathered or "all" in self.gathered:
            return self.call(node, {i: self.whole(i) for i in node.all_input_nodes})
        raise refusal(node, name, reason, source_line(node))


def _is_placed(found: Any) -> bool:
    if isinstance(found, (tuple, list)):
        return any(map(_is_placed, found))
    return isinstance(found, (Sharded, Partial))
