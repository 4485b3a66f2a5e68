"""Values as algebra: one side of a region, call by call.

A value is a stack of matrices, rows of channels. A call is what its pass says (`Algebra.calls`), else what linear
algebra says (`linear.py`). What nothing is known of is a function of its operands, equal where they are equal, if it is
one: not where it draws random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from .axioms import ROWS, Algebra, Axiom
from .functions import Meaning, Moves, function
from .letters import letter
from .linear import SAME, linear, order_of
from .matrices import Matrices
from .region import Definition, NotTranslated, Region, Side, is_zero, operands


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
        viewed = call.name in (*SAME, "index", "index_select", "select") or order_of(call) is not None
        return viewed and self.is_weight(call.args[0])

    def _made(self, node: Node) -> sympy.Expr:
        if node not in self.side.inner:
            if "weight" in node.meta:
                return self.matrices(node.meta["weight"])
            return sympy.S.Zero if is_zero(node) else letter(self.leaves[node], meaning="row")
        call = Call(self, node)
        made = self._chosen(call) if self.is_weight(node) else None
        if made is None and call.name in self.algebra.calls:
            made = self.algebra.calls[call.name](call)
        if made is None:
            made = linear(call)
        return call.opaque() if made is None else made

    def _chosen(self, call: Call) -> sympy.Expr | None:
        """Some matrices of a stack of weights."""
        if call.name not in ("index", "index_select", "select") or call.rank(call.args[0]) != 3:
            return None
        first = len(call.args[1]) == 1 if call.name == "index" else call.args[1] == 0
        return self.matrices.chosen(call.value(0), call.text(call.args[1:])) if first else None


class Call:
    """A call of an op, for who writes it as algebra."""

    def __init__(self, values: Values, node: Node):
        self.values, self.node = values, node
        definition: Definition = values.side.inner[node]
        self.args, self.kwargs = definition
        named: Any = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target)
        self.name = str(named)

    def of(self, node: Node) -> Call | None:
        """The call that an operand is the result of, on this side."""
        return Call(self.values, node) if node in self.values.side.inner else None

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
        moves: Moves | bool = False,
        first: Axiom | None = None,
        name: str = "",
    ) -> sympy.Expr:
        """f(others…, carried…), linear in `carried`: it mixes or moves their rows.

        rest: the other arguments, which belong to its name; moves: each row of the result is a row of theirs, by this
        function where it is known; first: the axiom that the first of the others is written by; name: the op's, where
        it is another's than this.
        """
        operands = [*others, *map(self.value, carried)]
        name = f"{name or self.name}[{','.join(map(self.text, rest))}]"
        positions = tuple(range(len(others), len(operands)))
        return function(
            name,
            operands,
            Meaning(ROWS, positions, True, bool(moves), first=first, moves=None if moves is True else moves or None),
        )

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
