"""Ops that only move elements, as index arithmetic: `RULES[overload](tile, node, index, mask)` is the node's value."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from ..compiler.traits import arguments, overloads
from .call import Unsupported
from .indexing import offset, reshape, split
from .sizes import Size, same, shape, size
from .tile import Tile
from .values import ZERO, Index, Mask, Term

Rule = Callable[[Tile, torch.fx.Node, Index, Mask], Term]
RULES: dict[Any, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads(names), function))
        return function

    return register


def _source(node: torch.fx.Node) -> torch.fx.Node:
    source = node.args[0]
    if not isinstance(source, torch.fx.Node):
        raise Unsupported(f"{node.name} has no single input")
    return source


def _replaced(index: Index, dim: int, term: Term) -> Index:
    return (*index[:dim], term, *index[dim + 1 :])


def _dim(node: torch.fx.Node, name: str = "dim", rank: int | None = None) -> int:
    rank = _source(node).meta["val"].dim() if rank is None else rank
    return int(arguments(node)[name]) % max(rank, 1)


@rule("alias.default detach.default clone.default contiguous.default")
def _same(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    return tile.value(_source(node), index, mask)


@rule("""view.default _unsafe_view.default reshape.default flatten.using_ints unflatten.int unsqueeze.default
         squeeze.default squeeze.dim squeeze.dims""")
def _reshape(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    if node.meta["val"].dtype != _source(node).meta["val"].dtype:
        raise Unsupported("it reinterprets bits")
    return tile.value(_source(node), reshape(tile, index, shape(node), shape(_source(node))), mask)


@rule("expand.default expand_as.default")
def _expand(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    return tile.broadcast(_source(node), index, mask)


@rule("transpose.int permute.default t.default movedim.int")
def _permute(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """The order comes from PyTorch itself: the op applied to a tensor whose sizes number its dimensions."""
    probe = torch.empty([0, *range(1, len(index))]) if index else torch.empty(())
    order = list(node.target(probe, *node.args[1:], **node.kwargs).shape)  # type: ignore[operator]
    inverse = sorted(range(len(order)), key=lambda k: order[k])
    return tile.value(_source(node), tuple(index[k] for k in inverse), mask)


@rule("slice.Tensor narrow.default")
def _slice(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    given, dim, source = arguments(node), _dim(node), _source(node)
    start = _start(given["start"], shape(source)[dim])
    return tile.value(source, _replaced(index, dim, offset(tile, index[dim], start, given.get("step", 1))), mask)


def _start(given: Any, length: Size) -> Size:
    if given is None:
        return 0
    start = size(given.meta["val"]) if isinstance(given, torch.fx.Node) else size(given)
    if isinstance(start, int) and start < 0:
        start = length + start
    if isinstance(start, int) and isinstance(length, int):
        return min(max(start, 0), length)
    if isinstance(start, int) or start.is_nonnegative or same(start, length):
        return start
    raise Unsupported(f"the slice starts at {start}, which may be negative")


@rule("select.int")
def _select(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    dim, source = _dim(node), _source(node)
    position = _start(arguments(node)["index"], shape(source)[dim])
    term = Term(str(position)) if isinstance(position, int) else tile.bind(
        "index", f"tl.full((), {tile.size(position)}, tl.int64)"
    )  # fmt: skip
    return tile.value(source, (*index[:dim], term, *index[dim:]), mask)


@rule("repeat_interleave.self_int")
def _repeat(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    given = arguments(node)
    if given["dim"] is None or not isinstance(given["repeats"], int) or given["repeats"] < 1:
        raise Unsupported("repeat_interleave without a dimension or with a symbolic count")
    dim = _dim(node)
    front, _ = split(tile, index[dim], given["repeats"])
    return tile.value(_source(node), _replaced(index, dim, front), mask)


@rule("cat.default")
def _concatenate(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    given = arguments(node)
    dtype = node.meta["val"].dtype
    pieces = [p for p in given["tensors"] if not any(same(s, 0) for s in shape(p))]
    if not pieces:
        raise Unsupported("it joins nothing")
    if any(p.meta["val"].dtype != dtype for p in pieces):
        raise Unsupported("it joins tensors of different dtypes")
    dim = _dim(node, rank=node.meta["val"].dim())
    ends: list[Size] = []
    for piece in pieces:
        ends.append((ends[-1] if ends else 0) + shape(piece)[dim])
    return _choose(tile, node, pieces, ends, dim, index, mask)


def _choose(
    tile: Tile, node: torch.fx.Node, pieces: list[torch.fx.Node], ends: list[Size], dim: int, index: Index, mask: Mask
) -> Term:
    """The first piece where the index lies before its end, otherwise the rest; each is read only where it lies."""
    term, begin = index[dim], 0
    if term.text.isdigit() and all(isinstance(end, int) for end in ends):
        k = next(k for k, end in enumerate(ends) if int(term.text) < end)
        local = Term(str(int(term.text) - (ends[k - 1] if k else 0)))
        return tile.value(pieces[k], _replaced(index, dim, local), mask)
    axes, texts, conditions, values = frozenset[str](), [], [], mask
    for k, (piece, end) in enumerate(zip(pieces, ends, strict=True)):
        last = k == len(pieces) - 1
        here = values
        if not last:
            before = tile.bind("before", f"{_typed(term)} < {tile.size(end)}", term.axes)
            here = (*values, before)
            conditions.append(before)
        local = term if k == 0 else tile.bind("index", f"{_typed(term)} - {tile.size(begin)}", term.axes)
        value = tile.value(piece, _replaced(index, dim, local), here)
        texts.append(value.text)
        axes |= value.axes | (term.axes if not last else frozenset())
        begin = end
        if not last:
            after = tile.bind("after", f"{_typed(term)} >= {tile.size(end)}", term.axes)
            values = (*mask, after)
    text = texts[-1]
    for condition, value_text in zip(reversed(conditions), reversed(texts[:-1]), strict=True):
        text = f"tl.where({condition.text}, {value_text}, {text})"
    return tile.bind(node.name, text, axes)


def _typed(term: Term) -> str:
    return f"tl.full((), {term.text}, tl.int64)" if term.text.isdigit() else term.text


@rule("stack.default")
def _stack(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """A concatenation of pieces of size 1 along a new dimension."""
    pieces = list(arguments(node)["tensors"])
    dim = _dim(node, rank=node.meta["val"].dim())
    if any(p.meta["val"].dtype != node.meta["val"].dtype for p in pieces):
        raise Unsupported("it joins tensors of different dtypes")
    rest, term = (*index[:dim], *index[dim + 1 :]), index[dim]
    values = [tile.value(p, rest, mask) for p in pieces]
    if term.text.isdigit():
        return values[int(term.text)]
    text, axes = values[-1].text, values[-1].axes | term.axes
    for k in reversed(range(len(pieces) - 1)):
        text, axes = f"tl.where({term.text} == {k}, {values[k].text}, {text})", axes | values[k].axes
    return tile.bind(node.name, text, axes)


@rule("chunk.default split.Tensor split_with_sizes.default unbind.int")
def _several(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    raise Unsupported("a list of tensors has no value of its own")


def piece(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """The value of `operator.getitem(split, k)`."""
    assert node.target is operator.getitem
    parent, k = _source(node), node.args[1]
    assert isinstance(k, int)
    source, pieces = _source(parent), parent.meta["val"]
    k %= len(pieces)
    dim = _dim(parent)
    if parent.target is torch.ops.aten.unbind.int:
        return tile.value(source, (*index[:dim], Term(str(k)) if k else ZERO, *index[dim:]), mask)
    start: Size = 0
    for earlier in pieces[:k]:
        start = start + size(earlier.shape[dim])
    return tile.value(source, _replaced(index, dim, offset(tile, index[dim], start)), mask)
