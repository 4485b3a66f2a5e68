"""Patterns: a computation written down once, matched however a model spells it.

A rule's `before` is ordinary arithmetic over variables; running it yields a tree of terms. The matcher walks that tree
from a root node upwards and looks through what does not change a value's meaning: operands in the other order, a cast
that is absent or written twice, `pow(x, 2)` against `x * x`, a scalar overload against a tensor one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
    """Matches a call of one of ATen's `ops` (names without overload), its leading arguments against `operands`.

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
    for bindings, nodes in follow(term, root, {}, (), None):
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


class Misfit(NamedTuple):
    """Why a part of a pattern and a value do not fit.

    kind: "op", "number", "scalar" (no number), "variable" (bound to something else), "option", "count" (of operands),
    "written" (in place); wanted, found: of which; name: the variable's or the option's.
    """

    kind: str
    wanted: Any
    found: Any
    name: str = ""


class Watcher:
    """Follows a match, and may let it go on where it fails: `debug/near_miss.py` explains matches by one.

    What it wants to know of the way so far it keeps in the bindings, which are undone with each way that leads nowhere.
    """

    def enters(self, term: Any, value: Any, bindings: Bindings) -> Bindings:
        """`term` is held against `value`."""
        return bindings

    def fails(self, term: Any, value: Any, misfit: Misfit, bindings: Bindings) -> Bindings | None:
        """They do not fit; bindings to go on with as if they did, or None."""
        return None

    def instead(self, term: Call, value: Any, bindings: Bindings, nodes: tuple[Node, ...]) -> _Found:
        """Other ways to hold a call of the pattern against a value."""
        return iter(())


def follow(term: Any, value: Any, bindings: Bindings, nodes: tuple[Node, ...], watcher: Watcher | None) -> _Found:
    """Each way in which `term` fits `value`: the variables, and the nodes inside."""
    if watcher is not None:
        bindings = watcher.enters(term, value, bindings)
    if isinstance(term, Call):
        yield from _match_call(term, value, bindings, nodes, watcher)
        if watcher is not None:
            yield from watcher.instead(term, value, bindings, nodes)
    elif isinstance(term, Either):
        for alternative in term.alternatives:
            if watcher is not None or not isinstance(alternative, Call) or _is_call_of(value, alternative.ops):
                yield from follow(alternative, value, bindings, nodes, watcher)
    elif isinstance(term, Through):
        outer, inner = value, nodes
        while True:
            bound = bindings if term.bind is None else {**bindings, term.bind: outer}
            yield from follow(term.x, value, bound, inner, watcher)
            if not _is_call_of(value, term.ops):
                return
            value, inner = value.args[0], (*inner, value)
    else:
        misfit = _misfit(term, value, bindings)
        if misfit is None:
            named = isinstance(term, (Var, Scalar)) and term.name not in bindings
            yield {**bindings, term.name: value} if named else bindings, nodes
        elif watcher is not None and (forgiven := watcher.fails(term, value, misfit, bindings)) is not None:
            yield forgiven, nodes


def _misfit(term: Any, value: Any, bindings: Bindings) -> Misfit | None:
    """What keeps a value from being a variable or a number of the pattern."""
    if isinstance(term, Var):
        if term.name not in bindings or same_value(bindings[term.name], value):
            return None
        return Misfit("variable", bindings[term.name], value, term.name)
    number = isinstance(value, (int, float))
    if isinstance(term, Scalar):
        if not number:
            return Misfit("scalar", None, value, term.name)
        known = bindings.get(term.name, value)
        return None if known is value or known == value else Misfit("variable", known, value, term.name)
    return None if number and value == term else Misfit("number", term, value)


def _is_call_of(value: Any, ops: Sequence[str]) -> bool:
    """Whether a value is a call of an ATen op of one of these names; another library may have an op of the same."""
    target = value.target if isinstance(value, Node) else None
    return getattr(target, "_opname", "") in ops and target.namespace == "aten"  # type: ignore[union-attr]


def _match_call(term: Call, node: Any, bindings: Bindings, nodes: tuple[Node, ...], watcher: Watcher | None) -> _Found:
    if not isinstance(node, Node) or node.op != "call_function":
        return
    if watcher is None and not _is_call_of(node, term.ops):
        return
    given = arguments(node)
    bound = dict(bindings)
    for misfit in _misfits(term, node, given, bound):
        forgiven = None if watcher is None else watcher.fails(term, node, misfit, bound)
        if forgiven is None:
            return
        bound.update(forgiven)
    values = list(given.values())[: len(term.operands)]
    orders = [values, values[::-1]] if term.commutative and len(values) == 2 else [values]
    for order in orders:
        yield from _match_all(term.operands, order, bound, (*nodes, node), watcher)


def _misfits(term: Call, node: Node, given: dict[str, Any], bound: Bindings) -> Iterator[Misfit]:
    """What keeps a node from being this call, but for its operands; variables among the options are bound."""
    if not _is_call_of(node, term.ops):
        yield Misfit("op", term.ops, node)
    if node.meta.get("written"):
        yield Misfit("written", None, node)
    if given.get("alpha", 1) != 1:
        yield Misfit("option", 1, given["alpha"], "alpha")
    if term.bind is not None and bound.setdefault(term.bind, node) is not node:
        yield Misfit("variable", bound[term.bind], node, term.bind)
    for name, wanted in term.options.items():
        actual = given.get(name)
        if isinstance(wanted, (Var, Scalar)):
            if bound.setdefault(wanted.name, actual) != actual:
                yield Misfit("variable", bound[wanted.name], actual, wanted.name)
        elif actual != wanted:
            yield Misfit("option", wanted, actual, name)
    if len(given) < len(term.operands):
        yield Misfit("count", len(term.operands), len(given))


def _match_all(
    terms: Sequence[Any], values: Sequence[Any], bindings: Bindings, nodes: tuple[Node, ...], watcher: Watcher | None
) -> _Found:
    if not terms:
        yield bindings, nodes
        return
    head, *rest = terms
    if isinstance(head, (list, tuple)):
        items = values[0]
        if isinstance(items, (list, tuple)) and len(items) == len(head):
            for b, n in _match_all(head, items, bindings, nodes, watcher):
                yield from _match_all(rest, values[1:], b, n, watcher)
        return
    for b, n in follow(head, values[0], bindings, nodes, watcher):
        yield from _match_all(rest, values[1:], b, n, watcher)
