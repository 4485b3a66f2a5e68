"""Experts in modules of their own: a sum over experts of each one's result times its weight for each token.

    dense          out = out + expert(x) * (weights * (indices == e)).sum(-1, keepdim=True)
    scattered      out = out + expert(x) * zeros(T, E).scatter(-1, indices, weights)[:, e : e + 1]
    gathered       t, k = torch.where(indices == e)
                   out.index_add_(0, t, expert(x[t]) * weights[t, k, None])

An expert is down(glu(gate(x), up(x))), or with gate and up in one linear; all have the same sizes and activation. What
the sum starts from may be anything, such as a shared expert: it is added to the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ....compiler.expressions import Concat, Reshape
from ....compiler.rewriter import Builder
from ..nodes import cast_from, op_name, value
from .gate import Gate, gate_of
from .reading import called, dim_of, distinct, indexed, item, shaped, unsqueezed, zeros

aten = torch.ops.aten


@dataclass(frozen=True)
class Linear:
    """x [..., n] times a weight of the model, [m, n], and its bias [m]: both the graph's nodes."""

    x: Node
    weight: Node
    bias: Node | None

    @property
    def rows(self) -> int:
        return int(value(self.weight).shape[0])


@dataclass(frozen=True)
class Term:
    """One expert's. first: its gate and up, or the one linear that is both; second: its down."""

    number: int
    hidden: Node
    indices: Node
    weights: Node
    activation: tuple[Any, ...]
    first: tuple[Linear, ...]
    second: Linear

    @property
    def kind(self) -> tuple[Any, ...]:
        """What all experts of a layer have in common."""
        sizes = [(one.rows, one.bias is None) for one in (*self.first, self.second)]
        return self.hidden, self.indices, self.weights, self.activation, tuple(sizes)


@dataclass(frozen=True)
class Separate:
    """A layer of experts: nodes as `fuseline::moe` takes them, with any dimensions of tokens.

    activation: it, whether interleaved, and the two numbers of the clamped one; firsts: gates and ups of all experts in
    turn, or the linears that are both; seconds: their downs; before: what the sum starts from, if not from zeros.
    """

    hidden: Node
    indices: Node
    weights: Node
    activation: tuple[Any, ...]
    experts: int
    firsts: tuple[Linear, ...]
    seconds: tuple[Linear, ...]
    before: Node | None

    def stacks(self, new: Builder, training: bool) -> list[Node | None]:
        """[E, 2I, H], [E, H, I], and the biases [E, 2I] and [E, H]; training: gradients pass through them."""
        hidden = int(value(self.hidden).shape[-1])
        inner = sum(linear.rows for linear in self.firsts) // self.experts
        shapes = ([self.experts, inner, hidden], [self.experts, hidden, inner // 2])
        linears = (self.firsts, self.seconds)
        made = [
            _stack(new, [x.weight for x in ones], shape, training) for ones, shape in zip(linears, shapes, strict=True)
        ]
        for ones, shape in zip(linears, shapes, strict=True):
            given = [linear.bias for linear in ones if linear.bias is not None]
            made.append(_stack(new, given, shape[:2], training) if given else None)
        return made


def _stack(new: Builder, parts: list[Node], shape: list[int], training: bool) -> Node:
    """Weights one after the other: a weight of its own, or, where gradients are wanted, computed in the graph."""
    if training:
        return new(aten.view.default, new(aten.cat.default, parts), shape)
    return new.weight(Reshape(Concat(tuple(part.meta["weight"] for part in parts), 0), tuple(shape)))


def separate(root: Node) -> Separate | None:
    """The layer whose sum ends at `root`."""
    terms, before = _terms(root)
    terms.sort(key=lambda term: term.number)
    one = terms[0] if len(terms) > 1 else None
    if one is None or [term.number for term in terms] != list(range(len(terms))):
        return None
    if any(term.kind != one.kind for term in terms):
        return None
    firsts = tuple(linear for term in terms for linear in term.first)
    parts = (one.hidden, one.indices, one.weights, one.activation)
    return Separate(*parts, len(terms), firsts, tuple(term.second for term in terms), before)


def _terms(root: Node) -> tuple[list[Term], Node | None]:
    """The terms of a sum from its end, and what it starts from."""
    found: list[Term] = []
    node: Any = root
    while isinstance(node, Node):
        added = called(node, "add", "index_add")
        if added is None or added.get("alpha", 1) != 1:
            break
        if op_name(node) == "index_add":
            term = _term(added["source"], added["index"]) if added["dim"] == 0 else None
            rest = added["self"]
        else:
            rest, term = added["self"], _term(added["other"])
            if term is None:
                rest, term = added["other"], _term(added["self"])
        if term is None:
            break
        found.append(term)
        node = rest
    first = _term(node)
    if first is not None:
        return [*found, first], None
    return found, None if zeros(node) else node


def _term(node: Any, tokens: Node | None = None) -> Term | None:
    """expert(x) times its weight; tokens: those that it is gathered for."""
    cast = cast_from(node) if isinstance(node, Node) else None
    product = called(cast if cast is not None else node, "mul")
    if product is None:
        return None
    for y, w in ((product["self"], product["other"]), (product["other"], product["self"])):
        second = _linear(y)
        gate = None if second is None else gate_of(second.x)
        parts = None if second is None else _first(second.x, gate)
        route = None if parts is None else _route(w, tokens)
        if second is None or parts is None or route is None:
            continue
        (activation, linears), (number, indices, weights) = parts, route
        x: Any = linears[0].x
        if tokens is not None:
            picked = indexed(x)
            x = picked[0] if picked is not None and picked[1] == [tokens] else None
        if x is not None and value(x).dim() == value(indices).dim():
            return Term(number, x, indices, weights, activation, linears, second)
    return None


def _first(inner: Node, gate: Gate | None) -> tuple[tuple[Any, ...], tuple[Linear, ...]] | None:
    """The activation, and gate and up: two linears, or halves of one."""
    if gate is not None:
        both = _linear(gate.both)
        found = (gate.activation, gate.interleaved, gate.alpha, gate.limit)
        return None if both is None else (found, (both,))
    halves = called(inner, "glu")
    if halves is None:
        return None
    gates, ups = _linear(halves["gate"]), _linear(halves["up"])
    if gates is None or ups is None or gates.x is not ups.x or gates.rows != ups.rows:
        return None
    return ((halves["activation"], False), (gates, ups)) if (gates.bias is None) == (ups.bias is None) else None


def _linear(node: Any) -> Linear | None:
    found = called(node, "linear")
    if found is None:
        return None
    weight, bias = found["weight"], found["bias"]
    own = all(table is None or "weight" in table.meta for table in (weight, bias))
    return Linear(found["input"], weight, bias) if own and value(weight).dim() == 2 else None


def _route(node: Any, tokens: Node | None) -> tuple[int, Node, Node] | None:
    """An expert's number, the indices and the weights that its weight for each token is read from."""
    cast = cast_from(node) if isinstance(node, Node) else None
    node = node if cast is None else cast
    if tokens is not None:
        return _gathered(node, tokens)
    if not isinstance(node, Node):
        return None
    last = value(node).dim() - 1
    summed = called(node, "sum")
    if summed is None:
        inner = unsqueezed(node, last)
        summed = called(inner, "sum")
        if summed is None or summed.get("keepdim"):
            return _scattered(node, inner)
    elif not summed.get("keepdim"):
        return None
    dims = summed.get("dim")
    if not isinstance(dims, (list, tuple)) or [dim_of(d, summed["self"]) for d in dims] != [last]:
        return None
    return _masked(summed["self"])


def _masked(node: Any) -> tuple[int, Node, Node] | None:
    """weights · (indices == e), or where the indices are e the weights, else 0."""
    product = called(node, "mul")
    if product is not None:
        for w, mask in ((product["self"], product["other"]), (product["other"], product["self"])):
            found = _equals(mask)
            if found is not None:
                return (*found, w)
    chosen = called(node, "where")
    if chosen is not None and "self" in chosen and zeros(chosen["other"]):
        found = _equals(chosen["condition"])
        return None if found is None else (*found, chosen["self"])
    filled = called(node, "masked_fill")
    if filled is not None and filled["value"] == 0:
        others = called(filled["mask"], "ne")
        return (
            None
            if others is None or type(others["other"]) is not int
            else (others["other"], others["self"], filled["self"])
        )
    return None


def _equals(mask: Any) -> tuple[int, Node] | None:
    cast = called(mask, "to", "_to_copy", "type_as")
    found = called(mask if cast is None else cast["self"], "eq")
    return (found["other"], found["self"]) if found is not None and type(found["other"]) is int else None


def _scattered(node: Node, inner: Node | None) -> tuple[int, Node, Node] | None:
    """Column e of zeros with the weights scattered in."""
    found = called(node, "slice")
    column = 0
    if found is not None:
        column = found["start"] or 0
        if found["end"] != column + 1 or dim_of(found["dim"], found["self"]) != value(node).dim() - 1:
            return None
    else:
        found = called(inner, "select")
        if found is None or dim_of(found["dim"], found["self"]) != value(found["self"]).dim() - 1:
            return None
        column = found["index"]
    put = called(found["self"], "scatter", "scatter_add")
    if put is None or not zeros(put["self"]) or dim_of(put["dim"], found["self"]) != value(found["self"]).dim() - 1:
        return None
    alone = op_name(found["self"]) == "scatter_add" or distinct(put["index"])
    return (column, put["index"], put["src"]) if alone and isinstance(put.get("src"), Node) else None


def _gathered(node: Any, tokens: Node) -> tuple[int, Node, Node] | None:
    """The weights of the places where the indices are e."""
    inner = unsqueezed(node, 1)
    picked = indexed(node if inner is None else inner)
    if picked is None:
        return None
    weights, places = picked
    if inner is None:
        weights = unsqueezed(weights, 2)
    if len(places) == 3 and places[2] is None:
        places = places[:2]
    if weights is None or len(places) != 2 or places[0] is not tokens:
        return None
    for first, second, turned in ((0, 1, False), (1, 0, True)):
        where = item(tokens, first, "where", "nonzero_numpy")
        other = item(places[1], second, "where", "nonzero_numpy")
        if where is None or other is not where:
            continue
        assert where is not None
        mask: Any = where.args[0]
        found = _equals(mask) if not turned else _one_hot(mask)
        if found is not None and shaped(weights, *value(found[1]).shape):
            return (*found, weights)
    return None


def _one_hot(mask: Any) -> tuple[int, Node] | None:
    """Row e of the indices as one-hot vectors, turned to [E, K, T]."""
    row = called(mask, "select")
    turned = None if row is None or row["dim"] != 0 else called(row["self"], "permute")
    hot = None if turned is None or list(turned["dims"]) != [2, 1, 0] else called(turned["self"], "one_hot")
    return None if row is None or hot is None else (row["index"], hot["self"])
