"""How the rule of an op group is written.

Most ops work row by row along most dimensions: element i of the result needs element i of the inputs and nothing else.
Such a rule says which dimension of each input goes with which one of the result (`dims`), and the rest follows, in both
directions: where the sequence of a result came from (`back`), and how a block of it is computed (`forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ....compiler.ops import REGISTRY
from ..placement import Shard, Sharded, is_one, same_size

if TYPE_CHECKING:
    from ..run import Run

Dims = dict[Node, Sequence[int | None]]
_RULES: dict[Any, Rule] = {}


class Rule:
    """What an op does to a shard."""

    starts = False  # whether a block of its result is better computed alone than cut out of the whole

    def back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        """Where the sequence along `shard` of the result lies in the inputs."""
        yield from ()

    def forward(self, run: Run, node: Node) -> Any:
        """This rank's part of the result: a tensor where it is replicated, `Sharded`, `Partial`, or a tuple."""
        raise NotImplementedError


class Rowwise(Rule):
    """An op that works row by row along the dimensions that `dims` names."""

    starts = True

    def __init__(self, dims: Callable[[Node], Dims] | None = None):
        if dims is not None:
            self.dims = dims  # type: ignore[method-assign, assignment]

    def dims(self, node: Node) -> Dims:
        """For each input tensor and each of its dimensions, the result's dimension that it goes with, or None."""
        raise NotImplementedError

    def mixes(self, run: Run, node: Node, source: Node) -> Any:
        """The result where the op mixes positions of a sharded input."""
        return run.refuse(node, f"it mixes positions of the sequence, which is cut along dimension "
                                f"{run.shard_of(source).dim} of {source.name}")  # fmt: skip

    def call(self, run: Run, node: Node, shard: Shard, local: dict[Node, torch.Tensor]) -> Any:
        """The op on this rank's blocks."""
        return run.call(node, local)

    def back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        whole = first(node.meta["val"])
        for source, to in self.dims(node).items():
            for d, goes in enumerate(to):
                if goes == shard.dim and same_size(value(source).shape[d], whole.shape[goes]):
                    yield source, shard.at(d)

    def forward(self, run: Run, node: Node) -> Any:
        dims = self.dims(node)
        shard: Shard | None = None
        for source, to in dims.items():
            found = run.values.get(source)
            if not isinstance(found, Sharded):
                continue
            goes = to[found.shard.dim]
            if goes is None:
                return self.mixes(run, node, source)
            here = found.shard.at(goes)
            if shard is not None and not shard.is_like(here):
                return run.refuse(node, "sequences that are cut in different ways meet")
            shard = here
        if shard is None:
            shard = run.starts[node]
        local = {source: run.local(source, to, shard, node) for source, to in dims.items()}
        result = self.call(run, node, shard, local)
        if isinstance(result, (tuple, list)):
            return tuple(Sharded(r, shard) for r in result)
        return Sharded(result, shard)


def rule(*targets: Any) -> Callable[[Any], Any]:
    """Gives these overloads a rule: of a `Rule` class, or of a function `dims`."""

    def add(what: Any) -> Any:
        made = what() if isinstance(what, type) else Rowwise(what)
        for target in targets:
            _RULES[target] = made
        return what

    return add


def find(target: Any) -> Rule | None:
    """The rule of an op, or None."""
    found = _RULES.get(target)
    if found is None and isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return _RULES[torch.Tag.pointwise]
    return found


def overloads(names: str) -> list[Any]:
    """`"add.Tensor neg.default"` → those overloads of `torch.ops.aten` that this PyTorch has."""
    found = []
    for name in names.split():
        packet, overload = name.split(".")
        op = getattr(getattr(torch.ops.aten, packet, None), overload, None)
        if op is not None:
            found.append(op)
    return found


def dialect(*names: str) -> list[Any]:
    """Those ops of the `fuseline` dialect that there are."""
    return [getattr(torch.ops.fuseline, name).default for name in names if name in REGISTRY]


def value(node: Any) -> torch.Tensor:
    """A node's fake tensor."""
    return node.meta["val"]


def first(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def tensors(node: Node) -> list[Node]:
    """The inputs that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def aligned(source: Node, rank: int) -> list[int | None]:
    """Broadcasting: dimensions counted from the right."""
    own = value(source).dim()
    return [d + rank - own for d in range(own)]


def same(source: Node, *mixed: int) -> list[int | None]:
    """Every dimension goes with itself, but for those that the op mixes."""
    rank = value(source).dim()
    without = {d % rank for d in mixed} if rank else set()
    return [None if d in without else d for d in range(rank)]


def nothing(source: Node) -> list[int | None]:
    """The op reads all of the input."""
    return [None] * value(source).dim()


def is_broadcast(source: Node, dim: int) -> bool:
    return is_one(value(source).shape[dim])
