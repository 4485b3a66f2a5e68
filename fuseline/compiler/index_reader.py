"""Reading a tensor's elements as terms of the index algebra, op by op, from the graph that computes it.

`Reader.read(node, index)` answers: what is `node[index]`? It pulls through the ops that build masks (see `index_ops`);
whatever it doesn't know becomes an opaque element, which equals itself and nothing else. So a proof never rests on an
op that was guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from .expressions import Constant
from .index_algebra import (
    FALSE,
    TRUE,
    AtLeast,
    Element,
    Formula,
    Holds,
    Linear,
    Value,
    apply,
    choose,
    negate,
)
from .index_proof import Prover
from .traits import arguments

if TYPE_CHECKING:
    from .program import Program

Index = tuple[Linear, ...]
ZERO = Linear()
HANDLERS: dict[str, Callable[[Reader, Node, dict[str, Any], Index], Value]] = {}
"""How to read one element of an op's result: op name → handler(reader, node, arguments by name, index)."""


class Opaque(Exception):
    """This element is not a term of the algebra."""


class Unreadable(Exception):
    """A tensor that is written in place: its elements depend on when they are read."""


def reads(*ops: str) -> Callable[[Any], Any]:
    """Registers a handler for these ops (names without overload)."""

    def add(handler: Any) -> Any:
        HANDLERS.update(dict.fromkeys(ops, handler))
        return handler

    return add


class Reader:
    """Reads elements of one program's tensors; what it reads twice it reads once."""

    def __init__(self, program: Program):
        self.program = program
        self.prover = Prover(program.fake_mode.shape_env)
        self._known: dict[tuple[Node, Index], Value] = {}

    def variable(self, name: str, size: Any) -> Linear:
        """A fresh index over a dimension of that size; 0 where the size is 1."""
        return ZERO if is_one(size) else self.prover.variable(name, self.size(size))

    def size(self, value: Any) -> Linear:
        """An int, a SymInt or the node that computes one, as a linear form."""
        if isinstance(value, Node):
            value = value.meta["val"]
        if not isinstance(value, (int, torch.SymInt)):
            raise Opaque
        return self.prover.size(value)

    def read(self, node: Node, index: Sequence[Linear]) -> Value:
        """The element of `node` at `index`, one form for each dimension.

        Raises:
            Unreadable: the element depends on a tensor that is written in place.
        """
        shape = node.meta["val"].shape
        place = tuple(ZERO if is_one(size) else i for i, size in zip(index, shape, strict=True))
        key = (node, place)
        if key not in self._known:
            self._known[key] = self._read(node, place)
        return self._known[key]

    def _read(self, node: Node, index: Index) -> Value:
        if node.meta.get("written") or node.name in self.program.mutated:
            raise Unreadable(node.name)
        number = literal(node)
        if not isinstance(number, Node):
            return self.operand(number, ())
        handler = HANDLERS.get(getattr(node.target, "_opname", "")) if node.op == "call_function" else None
        if handler is not None:
            try:
                return handler(self, node, arguments(node), index)
            except Opaque:
                pass
        return self.opaque(node, index)

    def opaque(self, node: Node, index: Index) -> Value:
        """The element as an unknown of its own."""
        dtype = node.meta["val"].dtype
        element = Element(node, index)
        if dtype == torch.bool:
            return Holds(element)
        if dtype.is_floating_point or dtype.is_complex:
            raise Opaque  # an unknown real is no term: whatever is computed from it is unknown too
        return Linear.of(element)

    def operand(self, value: Any, index: Index) -> Value:
        """An elementwise op's operand: a tensor, right-aligned with the result's index, a number, or a size."""
        if isinstance(value, Node):
            fake = value.meta["val"]
            if isinstance(fake, torch.Tensor):
                return self.read(value, index[len(index) - fake.dim() :])
            return self.size(value)
        if isinstance(value, bool):
            return TRUE if value else FALSE
        if isinstance(value, int):
            return Linear(constant=value)
        if isinstance(value, float):
            return value
        raise Opaque

    def choose(self, condition: Formula, then: Value, otherwise: Value) -> Value:
        """A choice; a branch that no index in range takes is dropped."""
        if self.prover.proves(condition):
            return then
        return otherwise if self.prover.proves(negate(condition)) else choose(condition, then, otherwise)

    def integer(self, value: Value) -> Linear:
        if isinstance(value, Linear):
            return value
        raise Opaque

    def at_least(self, form: Linear, bound: int) -> bool:
        return self.prover.proves(AtLeast(form - bound))

    def cast(self, value: Value, dtype: torch.dtype) -> Value:
        """A value in another dtype, where that keeps it exact or rounds it the same way."""
        return apply(lambda v: _cast(v, dtype), value)


def literal(node: Any) -> Any:
    """The Python number that a node stands for, when it is a constant of no dimensions; the argument itself otherwise.

    `torch.tensor(0.0)` and `torch.full([], 8.0)` in a model are such constants.
    """
    if not isinstance(node, Node):
        return node
    constant = node.meta.get("weight")
    if isinstance(constant, Constant) and constant.shape == ():
        return constant.values[0]
    name = getattr(node.target, "_opname", "") if node.op == "call_function" else ""
    if name in ("detach", "alias", "clone", "lift_fresh_copy") and not node.meta.get("written"):
        inner = literal(node.args[0])
        return node if isinstance(inner, Node) else inner
    if name in ("full", "scalar_tensor") and node.meta["val"].dim() == 0 and node.meta["val"].is_floating_point():
        number = node.args[-1]
        return number if isinstance(number, (int, float)) and not node.meta.get("written") else node
    return node


def is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _cast(value: Value, dtype: torch.dtype) -> Value:
    if dtype == torch.bool:
        if isinstance(value, Linear):
            if value.value is None:
                raise Opaque
            return FALSE if value.value == 0 else TRUE
        if isinstance(value, float):
            return TRUE if value else FALSE
        return value
    if dtype.is_complex:
        raise Opaque
    if isinstance(value, (AtLeast, Holds)) or not isinstance(value, (Linear, float)):
        return choose(value, _number(1, dtype), _number(0, dtype))  # type: ignore[arg-type]
    if isinstance(value, Linear) and value.value is not None:
        return _number(value.value, dtype)
    if isinstance(value, float):
        return _number(value, dtype)
    if dtype in (torch.int32, torch.int64):
        return value  # sizes and positions fit
    raise Opaque


def _number(value: float, dtype: torch.dtype) -> Value:
    if dtype.is_floating_point:
        return _rounded(float(value), dtype)
    if value != int(value) or not torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
        raise Opaque
    return Linear(constant=int(value))


def _rounded(value: float, dtype: torch.dtype) -> float:
    """To nearest, ties to even; Opaque among the subnormals."""
    limits = torch.finfo(dtype)
    if value == 0 or math.isinf(value) or math.isnan(value):
        return value
    if abs(value) < limits.tiny:
        raise Opaque
    bits = 1 - round(math.log2(limits.eps))
    mantissa, exponent = math.frexp(value)
    nearest = math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits)
    return nearest if abs(nearest) <= limits.max else math.copysign(math.inf, value)


from . import index_ops  # noqa: E402, F401  fills HANDLERS
