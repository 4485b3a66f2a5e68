"""Values as algebra: linear algebra's own ops, and those that a pass says more of.

A value is rows of channels: linear(x, W, b) is x·Wᵀ + b, a product with a vector x·diag(w), a slice of channels x·P,
an embedding its ids' unit rows times the table. A cast between floating-point types is left out. What nothing is known
of is a function of its operands, equal where they are equal, if it is one: not where it draws random numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from .axioms import ROWS, Algebra, Axiom
from .letters import centre, letter, pick
from .matrices import Matrices, joined, number
from .normal import Meaning, function, view
from .region import Definition, NotTranslated, Region, Side, is_zero, operands

_SAME = ("to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias")
_VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
_PRODUCTS = ("mm", "matmul", "bmm", "_grouped_mm", "grouped_mm", "grouped_mm_fallback")
_TURNS = ("transpose", "t", "swapaxes", "mT", "numpy_T")
_SPLITS = ("split", "chunk", "split_with_sizes")


class Values:
    """Writes one side of a region. matrices: shared by both sides, so that a parameter has one letter."""

    def __init__(self, region: Region, side: Side, matrices: Matrices, algebra: Algebra):
        self.side, self.matrices, self.algebra = side, matrices, algebra
        self.leaves = {leaf: f"x{i + 1}" for i, leaf in enumerate(region.leaves)}
        self._known: dict[Node, sympy.Expr] = {}

    def __call__(self, node: Node) -> sympy.Expr:
        """A node's value.

        Raises:
            NotTranslated: nothing can be said of it.
        """
        if node not in self._known:
            self._known[node] = self._made(node)
        return self._known[node]

    def is_weight(self, node: Any) -> bool:
        """Whether a node is a weight, or a view of one."""
        if not isinstance(node, Node):
            return False
        if node not in self.side.inner:
            return "weight" in node.meta
        call = Call(self, node)
        viewed = call.name in (*_SAME, *_TURNS, "permute", "index", "index_select", "select")
        return viewed and self.is_weight(call.args[0])

    def _made(self, node: Node) -> sympy.Expr:
        if node not in self.side.inner:
            if "weight" in node.meta:
                return self.matrices(node.meta["weight"])
            return sympy.S.Zero if is_zero(node) else letter(self.leaves[node], meaning="row")
        call = Call(self, node)
        made = self._weight(call) if self.is_weight(node) else None
        if made is None and call.name in self.algebra.calls:
            made = self.algebra.calls[call.name](call)
        if made is None:
            made = _linear(call)
        return call.opaque() if made is None else made

    def _weight(self, call: Call) -> sympy.Expr | None:
        """A view of a matrix, or of a stack of them."""
        x = call.value(0)
        rank = call.rank(call.args[0])
        if call.name in _SAME:
            return x
        if call.name in (*_TURNS, "permute"):
            order = list(range(rank))
            if call.name == "permute":
                order = [d % rank for d in call.args[1]]
            else:
                a, b = (d % rank for d in (*call.args[1:], *(() if len(call.args) > 1 else (-2, -1))))
                order[a], order[b] = b, a
            turned = [*range(rank - 2), rank - 1, rank - 2]
            return sympy.transpose(x) if order == turned else x if order == sorted(order) else None
        if (
            rank != 3
            or (call.name != "index" and call.args[1] != 0)
            or (call.name == "index" and len(call.args[1]) > 1)
        ):
            return None
        return self.chosen(x, call.text(call.args[1:]))

    def chosen(self, x: sympy.Expr, which: str) -> sympy.Expr:
        """Some matrices of stacks, for the stacks: what multiplies them all is the same for each."""
        return x.xreplace({stack: letter(f"{stack}{which}", meaning="row") for stack in self.matrices.stacks()})


class Call:
    """A call of an op, for who writes it as algebra."""

    def __init__(self, values: Values, node: Node):
        self.values, self.node = values, node
        definition: Definition = values.side.inner[node]
        self.args, self.kwargs = definition
        named: Any = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target)
        self.name = str(named)

    def value(self, argument: Any) -> sympy.Expr:
        """The value of an operand, or of the argument at a position."""
        return self.values(self.args[argument] if isinstance(argument, int) else argument)

    def shape(self, node: Node | None = None) -> tuple[str, ...]:
        """The sizes of the result, or of an operand, as text."""
        return tuple(map(str, (self.node if node is None else node).meta["val"].shape))

    def rank(self, node: Node | None = None) -> int:
        return len(self.shape(node))

    def width(self, node: Node | None = None) -> int:
        """The number of channels of the result, or of an operand.

        Raises:
            NotTranslated: it is no fixed number.
        """
        shape = self.shape(node)
        if not shape or not shape[-1].isdecimal():
            raise NotTranslated(f"op {self.name}: the number of channels is not fixed")
        return int(shape[-1])

    def is_tensor(self, argument: Any) -> bool:
        return isinstance(argument, Node) and isinstance(argument.meta.get("val"), torch.Tensor)

    def is_alike(self, argument: Any) -> bool:
        """Whether an argument is one number for all channels of a row."""
        if not self.is_tensor(argument):
            return True
        return self.rank(argument) == 0 or self.shape(argument)[-1] == "1"

    def text(self, value: Any) -> str:
        """Arguments as text; an operand by its value."""
        if isinstance(value, Node):
            return str(value.meta["val"]) if _is_number(value) else str(self.values(value))
        if isinstance(value, (tuple, list)):
            return f"({','.join(map(self.text, value))})"
        return "-" if value is None else str(value)

    def rows(
        self,
        carried: Sequence[Any],
        rest: Sequence[Any],
        others: Sequence[sympy.Expr] = (),
        picks: bool = False,
        first: Axiom | None = None,
    ) -> sympy.Expr:
        """f(others…, carried…), linear in `carried`: it mixes or moves their rows.

        rest: the other arguments, which belong to its name; picks: each row of the result is a row of theirs;
        first: the axiom that the first of the others is written by.
        """
        operands = [*others, *map(self.value, carried)]
        name = f"{self.name}[{','.join(map(self.text, rest))}]"
        positions = tuple(range(len(others), len(operands)))
        return function(name, operands, Meaning(ROWS, positions, True, picks, first=first))

    def opaque(self) -> sympy.Expr:
        """A function of which nothing is known but that equal operands give equal results."""
        tags = getattr(self.node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags or not callable(self.node.target):
            raise NotTranslated(f"op {self.name}")
        tensors = [n for n in operands((self.args, self.kwargs)) if not _is_number(n)]
        hole = lambda n: str(n.meta["val"]) if _is_number(n) else "·"
        args, kwargs = torch.fx.node.map_arg((self.args, self.kwargs), hole)
        name = f"{self.node.target}({','.join(map(str, [*args, *kwargs.items()]))})"
        return function(name, [self.values(n) for n in tensors], Meaning())


def _is_number(node: Node) -> bool:
    """Whether a node is a size or another number, which its text tells from any other."""
    return isinstance(node.meta.get("val"), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))


def _linear(call: Call) -> sympy.Expr | None:
    name, args = call.name, call.args
    if name in _SAME:
        val = args[0].meta["val"]
        return call.value(0) if val.is_floating_point() and call.node.meta["val"].is_floating_point() else None
    if name in _VIEWS and args[0].meta["val"].dtype == call.node.meta["val"].dtype:
        return view(call.value(0), call.shape(args[0]), call.shape())
    if name == "linear" and call.values.is_weight(args[1]):
        bias = call.value(2) if len(args) > 2 and args[2] is not None else sympy.S.Zero
        return call.value(0) * sympy.transpose(call.value(1)) + bias
    if name in _PRODUCTS and call.values.is_weight(args[1]) and call.rank(args[1]) > 1:
        return call.value(0) * _picked(call, args[1], args[2:])
    if name in ("addmm", "baddbmm") and not call.kwargs and call.values.is_weight(args[2]):
        return call.value(0) + call.value(1) * call.value(2)
    if name == "embedding":
        return letter(f"unit({call.text(args[1])})", meaning="row") * call.value(0)
    if name in ("add", "sub") and not call.kwargs and len(args) == 2:
        return _sum(call)
    if name == "neg":
        return -call.value(0)
    if name in ("mul", "div") and not call.kwargs and len(args) == 2:
        return _scaled(call)
    if name == "slice":
        return _sliced(call)
    if args and isinstance(args[0], Node) and call.node.target is operator.getitem:
        return _item(call)
    if name == "cat":
        return _joined(call)
    return None


def _picked(call: Call, weight: Node, rest: Any) -> sympy.Expr:
    """The matrix of a product; of a grouped one, each row's own."""
    made = call.value(weight)
    grouped = [*rest, *call.kwargs.values()]
    return call.values.chosen(made, call.text(grouped)) if grouped else made


def _sum(call: Call) -> sympy.Expr | None:
    a, b = call.args
    if not (call.is_tensor(a) and call.is_tensor(b)):
        return None
    if call.name == "sub" and _is_mean(call, b, a):
        return call.value(a) * centre(call.width(a))
    if call.shape(a)[-1:] != call.shape(b)[-1:]:
        return None
    return call.value(a) + (call.value(b) if call.name == "add" else -call.value(b))


def _is_mean(call: Call, node: Node, of: Node) -> bool:
    """Whether a node is the mean of the channels of another, one a row."""
    if node not in call.values.side.inner:
        return False
    mean = Call(call.values, node)
    if mean.name != "mean" or mean.kwargs or len(mean.args) != 3 or mean.args[0] is not of:
        return False
    dims = [d % call.rank(of) for d in mean.args[1]]
    return dims == [call.rank(of) - 1] and mean.args[2] is True


def _scaled(call: Call) -> sympy.Expr | None:
    a, b = call.args
    if call.name == "div":
        return call.value(a) / number(b) if call.is_tensor(a) and isinstance(b, (int, float)) and b else None
    if not call.is_tensor(a):
        a, b = b, a
    if isinstance(b, (int, float)):
        return call.value(a) * number(b)
    for x, by in ((a, b), (b, a)):
        vector = isinstance(by, Node) and "weight" in by.meta and by not in call.values.side.inner
        if vector and call.shape(by) == call.shape(x)[-1:] and call.rank(x) > 1:
            return call.value(x) * call.values.matrices.diagonal(by.meta["weight"])
    return None


def _sliced(call: Call) -> sympy.Expr | None:
    given: list[Any] = [*call.args, *[0, None, None, 1][len(call.args) - 1 :]]
    x, dim, start, _, step = given
    if int(dim) % call.rank(x) != call.rank(x) - 1 or step != 1:
        return None
    width, start = call.width(x), int(start or 0)
    start += width if start < 0 else 0
    return call.value(x) * pick(width, start, start + call.width())


def _item(call: Call) -> sympy.Expr | None:
    split, position = call.args
    if split not in call.values.side.inner:
        return None
    cut = Call(call.values, split)
    if cut.name not in _SPLITS:
        return None
    x, dim = cut.args[0], cut.args[2] if len(cut.args) > 2 else cut.kwargs.get("dim", 0)
    if dim % call.rank(x) != call.rank(x) - 1:
        return None
    widths = [int(piece.shape[-1]) for piece in split.meta["val"]]
    start = sum(widths[:position])
    return call.value(x) * pick(call.width(x), start, start + widths[position])


def _joined(call: Call) -> sympy.Expr | None:
    tensors, dim = (*call.args, 0)[:2]
    rank = call.rank()
    if dim % rank != rank - 1:
        return None
    return joined([(call.value(t), call.width(t)) for t in tensors], -1, (0,))
