"""Ops that move elements about: the sequence is followed through every reshape, permutation and concatenation."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from ....compiler.compat import known_size, size_hint
from ....compiler.traits import arguments
from ..placement import Partial, Shard, Sharded, is_one, same_size, through_reshape
from ._define import Dims, Rowwise, Rule, overloads, rule, same, tensors, value

if TYPE_CHECKING:
    from ..run import Run

aten = torch.ops.aten


@rule(operator.getitem)
class Part(Rule):
    """One of several results."""

    def back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        yield node.args[0], shard  # type: ignore[misc]

    def forward(self, run: Run, node: Node) -> Any:
        return run.values[node.args[0]][node.args[1]]  # type: ignore[index]


@rule(*overloads("view.default _unsafe_view.default reshape.default flatten.using_ints unflatten.int "
                 "unsqueeze.default squeeze.default squeeze.dim squeeze.dims view_as.default "
                 "reshape_as.default"))  # fmt: skip
class Reshape(Rule):
    def back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        source: Node = node.args[0]  # type: ignore[assignment]
        found = through_reshape(shard, value(node).shape, value(source).shape)
        if found is not None:
            yield source, found

    def forward(self, run: Run, node: Node) -> Any:
        source: Node = node.args[0]  # type: ignore[assignment]
        x = run.values[source]
        if not isinstance(x, Sharded):  # only the example of a `view_as` is sharded
            return run.call(node, {n: run.whole(n) for n in tensors(node)})
        shard = through_reshape(x.shard, value(source).shape, value(node).shape)
        if shard is None:
            return run.refuse(node, f"it takes the sequence, dimension {x.shard.dim}, apart")
        return Sharded(x.tensor.reshape(shard.shape(value(node).shape)), shard)


@rule(*overloads("transpose.int swapaxes.default swapdims.default permute.default t.default movedim.int "
                 "numpy_T.default mT.default"))  # fmt: skip
class Permute(Rowwise):
    starts = False

    def dims(self, node: Node) -> Dims:
        source: Node = node.args[0]  # type: ignore[assignment]
        rank = value(source).dim()
        name, rest = node.target._opname, node.args[1:]  # type: ignore[union-attr]
        order = list(range(rank))
        if name == "permute":
            order = [d % rank for d in rest[0]]  # type: ignore[union-attr]
        elif name == "numpy_T":
            order.reverse()
        elif name == "movedim":
            origin, goal = (int(d) % rank for d in rest)  # type: ignore[arg-type]
            order.remove(origin)
            order.insert(goal, origin)
        elif rank > 1:
            pair = rest or (-2, -1)  # those of `t` and `mT`
            a, b = (int(d) % rank for d in pair)  # type: ignore[arg-type]
            order[a], order[b] = order[b], order[a]
        return {source: [order.index(d) for d in range(rank)]}


@rule(*overloads("expand.default expand_as.default"))
class Expand(Rowwise):
    starts = False

    def dims(self, node: Node) -> Dims:
        source: Node = node.args[0]  # type: ignore[assignment]
        shift = value(node).dim() - value(source).dim()
        to = [d + shift for d in range(value(source).dim())]
        others = {n: same(n) for n in tensors(node) if n is not source}  # the example of an `expand_as`
        return {**others, source: to}

    def call(self, run: Run, node: Node, shard: Shard, local: dict[Node, torch.Tensor]) -> Any:
        return local[node.args[0]].expand(shard.shape(value(node).shape))  # type: ignore[index]


@rule(*overloads("repeat.default"))
class Repeat(Rowwise):
    starts = False

    def dims(self, node: Node) -> Dims:
        source, times = node.args[:2]
        shift = len(times) - value(source).dim()  # type: ignore[arg-type]
        return {source: [d + shift if known_size(times[d + shift]) == 1 else None for d in range(value(source).dim())]}  # type: ignore


@rule(*overloads("repeat_interleave.self_int"))
class RepeatInterleave(Rowwise):
    starts = False

    def dims(self, node: Node) -> Dims:
        given = arguments(node)
        x, dim = given["self"], given["dim"]
        return {x: same(x, dim) if dim is not None else [None] * value(x).dim()}

    def mixes(self, run: Run, node: Node, source: Node) -> Any:
        """Positions repeated one by one: what lies inside of the sequence grows."""
        given, shard = arguments(node), run.values[source].shard
        if given["dim"] is None or not isinstance(given["repeats"], int):
            return super().mixes(run, node, source)
        local = run.call(node, {source: run.values[source].tensor})
        return Sharded(local, Shard(shard.dim, shard.axis, shard.outer, shard.inner * given["repeats"]))


class _Cut(Rowwise):
    """A part along a dimension; along the sequence only its beginning can be had without moving anything."""

    starts = False

    def dims(self, node: Node) -> Dims:
        return {node.args[0]: same(node.args[0])}  # type: ignore[dict-item, arg-type]

    def dim(self, node: Node) -> int:
        given = arguments(node)
        return int(given["dim"]) % value(given["self"]).dim()

    def forward(self, run: Run, node: Node) -> Any:
        x = run.values[node.args[0]]  # type: ignore[index]
        if isinstance(x, Sharded) and x.shard.dim == self.dim(node):
            return self.along_sequence(run, node, x)
        return super().forward(run, node)

    def along_sequence(self, run: Run, node: Node, x: Sharded) -> Any:
        return run.refuse(node, f"it cuts the sequence, dimension {x.shard.dim}, in another way")

    def back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        if shard.dim != self.dim(node):
            yield node.args[0], shard  # type: ignore[misc]


@rule(*overloads("slice.Tensor narrow.default"))
class Slice(_Cut):
    def along_sequence(self, run: Run, node: Node, x: Sharded) -> Any:
        given, shard = arguments(node), x.shard
        plain = is_one(shard.outer) and is_one(shard.inner)
        starts_at = given.get("start") or 0
        whole, part = value(node.args[0]).shape[shard.dim], value(node).shape[shard.dim]  # type: ignore[arg-type]
        if not plain or given.get("step", 1) != 1 or isinstance(starts_at, Node):
            return super().along_sequence(run, node, x)
        if known_size(starts_at) == 0:  # positions stay where they are; there are fewer of them
            axis = shard.axis.cut(part) if not same_size(whole, part) else shard.axis
            return Sharded(x.tensor, Shard(shard.dim, axis))
        return self._moved(run, x, starts_at if starts_at > 0 else starts_at + whole, part)

    def _moved(self, run: Run, x: Sharded, start: Any, length: Any) -> Any:
        """Positions from the middle would lie on other ranks than before: few of them (the window of a cache) are
        added up from all ranks, each of which has zeros for the others'; many are cut out of the whole."""
        dim, axis = x.shard.dim, x.shard.axis
        if size_hint(length) * 2 > size_hint(axis.length):
            return run.group.gather(x.tensor, x.shard).narrow(dim, start, length)
        at = run.group.positions(axis, x.tensor.device) - start
        inside = ((at >= 0) & (at < length)).view([-1 if d == dim else 1 for d in range(x.tensor.dim())])
        shape = [length if d == dim else s for d, s in enumerate(x.tensor.shape)]
        return Partial(
            x.tensor.new_zeros(shape).index_add(dim, at.clamp(0, length - 1), torch.where(inside, x.tensor, 0))
        )


@rule(*overloads("split.Tensor split_with_sizes.default chunk.default unsafe_split.Tensor unsafe_chunk.default"))
class Split(_Cut):
    pass


@rule(*overloads("select.int unbind.int"))
class Select(_Cut):
    def dims(self, node: Node) -> Dims:
        at, source = self.dim(node), node.args[0]
        rank = value(source).dim()  # type: ignore[arg-type]
        return {source: [None if d == at else d - (d > at) for d in range(rank)]}  # type: ignore[dict-item]

    def back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        yield node.args[0], shard.at(shard.dim + (shard.dim >= self.dim(node)))  # type: ignore[misc]

    def along_sequence(self, run: Run, node: Node, x: Sharded) -> Any:
        """One position, such as the first of an encoder: the rank that holds it adds it to the others' zeros."""
        shard, index = x.shard, arguments(node).get("index")
        plain = is_one(shard.outer) and is_one(shard.inner)
        if not plain or index is None or isinstance(index, Node):
            return super().along_sequence(run, node, x)
        at = index if index >= 0 else index + shard.axis.length
        here = run.group.positions(shard.axis, x.tensor.device) == at
        mask = here.view([-1 if d == shard.dim else 1 for d in range(x.tensor.dim())])
        return Partial(torch.where(mask, x.tensor, 0).sum(shard.dim).to(x.tensor.dtype))


@rule(*overloads("cat.default"))
class Concatenate(Rowwise):
    starts = False

    def dims(self, node: Node) -> Dims:
        along = self._dim(node)
        empty = self._empty(node)
        return {n: same(n, along) if n not in empty else [None] * value(n).dim() for n in tensors(node)}

    def _dim(self, node: Node) -> int:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return int(dim) % value(node).dim()  # type: ignore[arg-type, call-overload]

    def _empty(self, node: Node) -> list[Node]:
        return [n for n in tensors(node) if known_size(value(n).shape[min(self._dim(node), value(n).dim() - 1)]) == 0]

    def _only(self, node: Node) -> Node | None:
        """The one part that is not empty."""
        parts = [n for n in node.args[0] if n not in self._empty(node)]  # type: ignore[union-attr]
        return parts[0] if len(parts) == 1 else None  # type: ignore[return-value]

    def back(self, node: Node, shard: Shard) -> Iterator[tuple[Node, Shard]]:
        only = self._only(node)
        if only is not None:
            yield only, shard
        else:
            yield from super().back(node, shard)

    def forward(self, run: Run, node: Node) -> Any:
        only = self._only(node)
        if only is not None:
            return run.values[only]
        shards = [s.shard for n in tensors(node) if isinstance(s := run.values.get(n), Sharded)]
        if any(s.dim == self._dim(node) for s in shards):
            return self._side_by_side(run, node, shards)
        return super().forward(run, node)

    def _side_by_side(self, run: Run, node: Node, shards: list[Shard]) -> Any:
        """Parts that lie along the sequence: equal ones become its outer dimension, as routers' logits of many layers
        do; others cannot stay cut."""
        parts = [run.values[n] for n in node.args[0]]  # type: ignore[union-attr]
        dim = self._dim(node)
        if dim == 0 and len(shards) == len(parts) and all(s.is_like(shards[0]) for s in shards):
            shard = Shard(0, shards[0].axis, sum(s.outer for s in shards), shards[0].inner)
            return Sharded(torch.cat([p.tensor for p in parts], 0), shard)
        return run.refuse(node, f"it puts other elements beside the sequence, dimension {dim}")


@rule(*overloads("stack.default"))
def stack(node: Node) -> Dims:
    rank = value(node).dim()
    dim = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % rank  # type: ignore
    return {n: [d + (d >= dim) for d in range(rank - 1)] for n in tensors(node)}


@rule(*overloads("pad.default constant_pad_nd.default"))
class Pad(Rowwise):
    starts = False

    def dims(self, node: Node) -> Dims:
        x, widths = node.args[:2]
        rank = value(x).dim()  # type: ignore[arg-type]
        padded = [rank - 1 - i // 2 for i, w in enumerate(widths) if known_size(w) != 0]  # type: ignore[arg-type]
        return {x: same(x, *padded)}  # type: ignore[dict-item, arg-type]
