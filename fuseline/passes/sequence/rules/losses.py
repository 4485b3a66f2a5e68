"""Losses: each rank adds up its own tokens, and the sum over all ranks is divided by all ranks' number of tokens.

A rank without a single valid token adds zero to both, so no rank's loss is NaN and no token counts more than another.
Labels stay whole until here, so a shift by one position has happened before they are cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ....compiler.traits import arguments
from ..placement import Partial, Shard, Sharded
from ._define import Rowwise, dialect, overloads, rule, same, value

if TYPE_CHECKING:
    from ..run import Run

NONE, MEAN, SUM = 0, 1, 2


@rule(*overloads("cross_entropy_loss.default nll_loss.default nll_loss_nd.default"))
class CrossEntropy(Rowwise):
    """Logits [N, C] or [N, C, …] against classes, weighted or smoothed."""

    starts = False

    def forward(self, run: Run, node: Node) -> Any:
        given = arguments(node)
        logits, target, weight = given["self"], given["target"], given["weight"]
        rank, classes = value(logits).dim(), 1 if value(logits).dim() > 1 else 0
        found = run.values[logits] if isinstance(run.values[logits], Sharded) else run.values[target]
        if value(target).is_floating_point():
            return run.refuse(node, "its targets are probabilities; only classes are counted over ranks")
        to_logits = [d if d < classes else d + 1 for d in range(rank - 1)]
        shard = found.shard if found is run.values[logits] else found.shard.at(to_logits[found.shard.dim])
        if shard.dim == classes:
            return run.refuse(node, "the sequence is cut along its classes")
        x = run.local(logits, same(logits), shard, node)
        y = run.local(target, to_logits, shard, node)
        ignored = given["ignore_index"]
        ignored = ignored if isinstance(ignored, int) else -100
        at = shard.dim - (shard.dim > classes)
        if not shard.axis.even:
            y = torch.where(run.group.valid(shard.at(at), y.dim(), y.device), y, ignored)
        weights = run.whole(weight) if weight is not None else None
        extra = [given["label_smoothing"]] if "label_smoothing" in given else []
        call = lambda reduction: node.target(x, y, weights, reduction, ignored, *extra)  # type: ignore[operator]
        if given["reduction"] == NONE:
            return Sharded(call(NONE), shard.at(at))
        total = call(SUM)
        if given["reduction"] == SUM:
            return Partial(total)
        return _mean(run, total, y, weights, ignored)


def _mean(run: Run, total: torch.Tensor, y: torch.Tensor, weights: torch.Tensor | None, ignored: int) -> torch.Tensor:
    """All ranks' sums over all ranks' number of tokens (or their weight), in one exchange."""
    kept = y != ignored
    count = weights[torch.where(kept, y, 0)] * kept if weights is not None else kept
    wide = torch.float32 if total.dtype.itemsize < 4 else total.dtype  # 16 bits cannot count tokens
    both = torch.stack([total.to(wide), count.sum().to(wide)])
    whole, tokens = run.group.all_reduce(both).unbind()
    return (whole / tokens).to(total.dtype)


@rule(*dialect("linear_cross_entropy"))
class LinearCrossEntropy(Rowwise):
    """A linear layer and its loss in one op: rows [N, H] against classes [N]."""

    starts = False

    def forward(self, run: Run, node: Node) -> Any:
        given = arguments(node)
        x, target = given["x"], given["target"]
        found = next(s for n in (x, target) if isinstance(s := run.values[n], Sharded))
        shard: Shard = found.shard
        if shard.dim != 0:
            return run.refuse(node, "the sequence is cut along the width of its rows")
        y = run.local(target, [0], shard, node)
        if not shard.axis.even:
            y = torch.where(run.group.valid(shard, 1, y.device), y, given["ignore_index"])
        local = {x: run.local(x, [0, None], shard, node)}
        whole = {n: run.whole(n) for n in node.all_input_nodes if n not in (x, target)}
        values = {k: {**local, **whole, target: y}.get(v, v) if isinstance(v, Node) else v for k, v in given.items()}
        values["reduction"] = given["reduction"] if given["reduction"] == NONE else SUM
        result = node.target(**values)  # type: ignore[operator]
        if given["reduction"] == NONE:
            return Sharded(result, shard)
        return Partial(result) if given["reduction"] == SUM else self._mean(run, given, result, y)

    def _mean(self, run: Run, given: dict[str, Any], total: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        weights = run.whole(given["class_weight"]) if given["class_weight"] is not None else None
        return _mean(run, total, y, weights, given["ignore_index"])


@rule(*overloads("mse_loss.default l1_loss.default smooth_l1_loss.default huber_loss.default "
                 "binary_cross_entropy_with_logits.default"))  # fmt: skip
class Elementwise(Rowwise):
    """Losses between two tensors of one shape, whose mean is over a number of elements that is known."""

    starts = False

    def forward(self, run: Run, node: Node) -> Any:
        given = arguments(node)
        x, y = given["self"], given["target"]
        found = next(run.values[n] for n in (x, y) if isinstance(run.values[n], Sharded))
        rank = value(x).dim()
        if value(y).dim() != rank or any(given.get(name) is not None for name in ("weight", "pos_weight")):
            return run.refuse(node, "it broadcasts or weighs its elements")
        shard: Shard = found.shard
        local = [run.local(n, same(n), shard, node) for n in (x, y)]
        rest = {a.name: given[a.name] for a in node.target._schema.arguments[2:] if a.name in given}  # type: ignore
        rest["reduction"] = NONE
        each = node.target(*local, **rest)  # type: ignore[operator]
        if given["reduction"] == NONE:
            return Sharded(each, shard)
        total = run.masked(Sharded(each, shard)).sum()
        return Partial(total / value(x).numel() if given["reduction"] == MEAN else total)
