"""Patterns: a computation written down once, matched however a model spells it.

A rule's `before` is ordinary arithmetic over variables; running it yields a tree of terms. The matcher walks that tree
from a root node upwards and looks through what does not change a value's meaning: operands in the other order, a cast
that is absent or written twice, `pow(x, 2)` against `x * x`, a scalar overload against a tensor one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from .traits import arguments

Bindings = dict[str, Any]


class Term:
    """A pattern; arithmetic on terms builds bigger ones."""

    def __add__(self, other: Any) -> Term:
        return Call(("add",), (self, other), commutative=True)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Term:
        return Call(("mul",), (self, other), commutative=True)

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> Term:
        return Call(("sub",), (self, other))

    def __truediv__(self, other: Any) -> Term:
        return Call(("div",), (self, other))

    def __matmul__(self, other: Any) -> Term:
        return Call(("matmul", "bmm", "mm"), (self, other))

    def __neg__(self) -> Term:
        return Call(("neg",), (self,))


@dataclass(frozen=True, eq=False)
class Var(Term):
    """Matches any value and binds it; a name used twice must bind the same value."""

    name: str


@dataclass(frozen=True, eq=False)
class Scalar(Term):
    """Matches a Python number and binds it."""

    name: str


@dataclass(frozen=True, eq=False)
class Call(Term):
    """Matches a call of one of `ops` (names without overload), its leading arguments against `operands`.

    `options` are further arguments by their schema name: a literal, or a variable to bind them.
    """

    ops: tuple[str, ...]
    operands: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    commutative: bool = False
    bind: str | None = None


@dataclass(frozen=True, eq=False)
class Either(Term):
    """Matches the first alternative that fits."""

    alternatives: tuple[Term, ...]


@dataclass(frozen=True, eq=False)
class Through(Term):
    """Looks through any number of calls of `ops` above `x`; binds the outermost node seen, or x itself, to `bind`."""

    x: Term
    ops: tuple[str, ...]
    bind: str | None = None


def call(ops: str | Sequence[str], *operands: Any, bind: str | None = None, **options: Any) -> Term:
    """A call of an op (or of one of several) on `operands`."""
    return Call((ops,) if isinstance(ops, str) else tuple(ops), operands, options, bind=bind)


def maybe_cast(x: Term, bind: str | None = None) -> Term:
    """x, or x in another floating-point type."""
    return Through(x, ("to", "_to_copy"), bind)


def square(x: Term) -> Term:
    """x², as a power or a product."""
    return Either((call("pow", x, 2), call("square", x), x * x))


def mean(x: Term, dims: str = "dims") -> Term:
    """The mean over the dimensions bound to `dims`, kept."""
    return call("mean", x, dim=Var(dims), keepdim=True)


def rsqrt(x: Term) -> Term:
    """1/√x, in one op, as a power, or as a quotient."""
    return Either((call("rsqrt", x), call("pow", x, -0.5), call("reciprocal", call("sqrt", x))))


@dataclass
class Match:
    """A pattern found: its root, what the variables are, and the nodes inside. `m.x` reads variable x."""

    root: Node
    bindings: Bindings
    nodes: tuple[Node, ...]

    def __getattr__(self, name: str) -> Any:
        bindings = self.__dict__.get("bindings", {})
        if name in bindings:
            return bindings[name]
        raise AttributeError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self.bindings.get(name, default)


def find(term: Term, root: Node) -> Match | None:
    """Matches `term` with `root` as its last node."""
    for bindings, nodes in _match(term, root, {}, ()):
        return Match(root, bindings, nodes)
    return None


def root_ops(term: Term) -> frozenset[str]:
    """The ops that the last node of a match can be."""
    if isinstance(term, Call):
        return frozenset(term.ops)
    if isinstance(term, Either):
        return frozenset().union(*(root_ops(t) for t in term.alternatives))
    if isinstance(term, Through):
        return root_ops(term.x) | frozenset(term.ops)
    raise TypeError(f"a pattern needs an op at its root, not {term!r}")


def same_value(first: Any, second: Any, depth: int = 4) -> bool:
    """Whether two values are surely equal: one node, equal literals, or the same pure op on the same values."""
    if not isinstance(first, Node) or not isinstance(second, Node):
        return type(first) is type(second) and bool(first == second)
    if first is second:
        return True
    if depth == 0 or first.op != "call_function" or first.target is not second.target or _impure(first):
        return False
    a, b = (*first.args, *first.kwargs.items()), (*second.args, *second.kwargs.items())
    return len(a) == len(b) and all(same_value(x, y, depth - 1) for x, y in zip(a, b, strict=True))


def _impure(node: Node) -> bool:
    tags = getattr(node.target, "tags", ())
    schema = getattr(node.target, "_schema", None)
    return torch.Tag.nondeterministic_seeded in tags or schema is None or schema.is_mutable


_Found = Iterator[tuple[Bindings, tuple[Node, ...]]]


def _match(term: Any, value: Any, bindings: Bindings, nodes: tuple[Node, ...]) -> _Found:
    if isinstance(term, Var):
        if term.name not in bindings:
            yield {**bindings, term.name: value}, nodes
        elif same_value(bindings[term.name], value):
            yield bindings, nodes
    elif isinstance(term, Scalar):
        if isinstance(value, (int, float)) and (term.name not in bindings or bindings[term.name] == value):
            yield {**bindings, term.name: value}, nodes
    elif isinstance(term, Either):
        for alternative in term.alternatives:
            yield from _match(alternative, value, bindings, nodes)
    elif isinstance(term, Through):
        outer, inner = value, nodes
        while True:
            bound = bindings if term.bind is None else {**bindings, term.bind: outer}
            yield from _match(term.x, value, bound, inner)
            if not (isinstance(value, Node) and getattr(value.target, "_opname", "") in term.ops):
                return
            value, inner = value.args[0], (*inner, value)
    elif isinstance(term, Call):
        yield from _match_call(term, value, bindings, nodes)
    elif not isinstance(value, Node) and isinstance(value, (int, float)) and value == term:
        yield bindings, nodes


def _match_call(term: Call, node: Any, bindings: Bindings, nodes: tuple[Node, ...]) -> _Found:
    if not isinstance(node, Node) or node.op != "call_function" or getattr(node.target, "_opname", "") not in term.ops:
        return
    if node.meta.get("written"):
        return
    given = arguments(node)
    if given.get("alpha", 1) != 1:
        return
    if term.bind is not None:
        if term.bind in bindings and bindings[term.bind] is not node:
            return
        bindings = {**bindings, term.bind: node}
    for name, wanted in term.options.items():
        actual = given.get(name)
        if isinstance(wanted, (Var, Scalar)):
            if wanted.name in bindings and bindings[wanted.name] != actual:
                return
            bindings = {**bindings, wanted.name: actual}
        elif actual != wanted:
            return
    values = list(given.values())[: len(term.operands)]
    if len(values) < len(term.operands):
        return
    orders = [values, values[::-1]] if term.commutative and len(values) == 2 else [values]
    for order in orders:
        yield from _match_all(term.operands, order, bindings, (*nodes, node))


def _match_all(terms: Sequence[Any], values: Sequence[Any], bindings: Bindings, nodes: tuple[Node, ...]) -> _Found:
    if not terms:
        yield bindings, nodes
        return
    head, *rest = terms
    if isinstance(head, (list, tuple)):
        items = values[0]
        if isinstance(items, (list, tuple)) and len(items) == len(head):
            for b, n in _match_all(head, items, bindings, nodes):
                yield from _match_all(rest, values[1:], b, n)
        return
    for b, n in _match(head, values[0], bindings, nodes):
        yield from _match_all(rest, values[1:], b, n)
