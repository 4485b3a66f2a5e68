"""How the index algebra reads the ops that masks are made of: positions, comparisons, logic, views, gathers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .index_algebra import (
    FALSE,
    TRUE,
    AtLeast,
    Formula,
    Linear,
    Value,
    apply,
    both,
    choose,
    either,
    equal,
    is_formula,
    negate,
)
from .index_reader import ZERO, Index, Opaque, Reader, is_one, reads

# Creations


@reads("arange")
def _arange(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    if node.meta["val"].dtype not in (torch.int64, torch.int32):
        raise Opaque
    step = given.get("step", 1)
    if not isinstance(step, int):
        raise Opaque
    return index[0] * step + reader.size(given.get("start", 0))


@reads("full", "full_like", "new_full", "scalar_tensor")
def _full(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    value = given.get("fill_value", given.get("s"))
    return reader.cast(reader.operand(value, ()), node.meta["val"].dtype)


@reads("ones", "ones_like", "new_ones", "zeros", "zeros_like", "new_zeros")
def _constant(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    number = Linear(constant=int("ones" in node.target._opname))  # type: ignore[union-attr]
    return reader.cast(number, node.meta["val"].dtype)


# Arithmetic and logic


def _elementwise(reader: Reader, given: dict[str, Any], index: Index, names: tuple[str, ...]) -> list[Value]:
    if given.get("alpha", 1) != 1:
        raise Opaque
    return [reader.operand(given[name], index) for name in names]


def _arithmetic(integers: Any, reals: Any) -> Any:
    """A function of two numbers: linear forms of one kind, reals of the other."""

    def compute(a: Value, b: Value) -> Value:
        a, b = (_plain(v) for v in (a, b))
        if isinstance(a, Linear) and isinstance(b, Linear):
            return integers(a, b)
        return reals(_real(a), _real(b))

    return lambda a, b: apply(compute, _numeric(a), _numeric(b))


def _numeric(value: Value) -> Value:
    """A truth value in arithmetic counts 1 or 0."""
    return choose(value, Linear(constant=1), ZERO) if is_formula(value) else value


def _plain(value: Value) -> Value:
    if isinstance(value, (Linear, float)):
        return value
    raise Opaque


def _real(value: Value) -> float:
    if isinstance(value, Linear) and value.value is not None:
        return float(value.value)
    if isinstance(value, float):
        return value
    raise Opaque


def _times(a: Linear, b: Linear) -> Linear:
    if a.value is not None:
        return b * a.value
    if b.value is not None:
        return a * b.value
    raise Opaque


ARITHMETIC = {
    "add": _arithmetic(lambda a, b: a + b, lambda a, b: a + b),
    "sub": _arithmetic(lambda a, b: a - b, lambda a, b: a - b),
    "rsub": _arithmetic(lambda a, b: b - a, lambda a, b: b - a),
    "mul": _arithmetic(_times, lambda a, b: a * b),
}


@reads("add", "sub", "rsub", "mul")
def _arithmetic_op(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    a, b = _elementwise(reader, given, index, ("self", "other"))
    dtype = node.meta["val"].dtype
    if dtype == torch.bool:
        if not (is_formula(a) and is_formula(b)):
            raise Opaque
        return {"mul": both, "add": either}[node.target._opname](a, b)  # type: ignore[union-attr]
    return reader.cast(ARITHMETIC[node.target._opname](a, b), dtype)  # type: ignore[union-attr]


@reads("neg")
def _neg(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    return ARITHMETIC["rsub"](reader.operand(given["self"], index), ZERO)


COMPARISONS = {
    "le": (lambda a, b: AtLeast(b - a), lambda a, b: a <= b),
    "lt": (lambda a, b: AtLeast(b - a - 1), lambda a, b: a < b),
    "ge": (lambda a, b: AtLeast(a - b), lambda a, b: a >= b),
    "gt": (lambda a, b: AtLeast(a - b - 1), lambda a, b: a > b),
    "eq": (equal, lambda a, b: a == b),
    "ne": (lambda a, b: negate(equal(a, b)), lambda a, b: a != b),
}

LONG_NAMES = {
    "less_equal": "le", "less": "lt", "greater_equal": "ge", "greater": "gt", "not_equal": "ne",
}  # fmt: skip


@reads(*COMPARISONS, *LONG_NAMES)
def _comparison(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    name = node.target._opname  # type: ignore[union-attr]
    integers, reals = COMPARISONS[LONG_NAMES.get(name, name)]
    a, b = _elementwise(reader, given, index, ("self", "other"))

    def compare(x: Value, y: Value) -> Value:
        x, y = _plain(x), _plain(y)
        if isinstance(x, Linear) and isinstance(y, Linear):
            return both(integers(x, y))
        return TRUE if reals(_real(x), _real(y)) else FALSE

    return apply(compare, _numeric(a), _numeric(b))


def _formula(value: Value) -> Formula:
    if is_formula(value):
        return value
    raise Opaque


@reads("__and__", "bitwise_and", "logical_and", "__or__", "bitwise_or", "logical_or", "__xor__", "bitwise_xor")
def _logic(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    a, b = (_formula(v) for v in _elementwise(reader, given, index, ("self", "other")))
    name = node.target._opname.strip("_")  # type: ignore[union-attr]
    if "xor" in name:
        return either(both(a, negate(b)), both(negate(a), b))
    return both(a, b) if "and" in name else either(a, b)


@reads("logical_not", "bitwise_not")
def _not(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    return negate(_formula(reader.operand(given["self"], index)))


@reads("where")
def _where(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    condition = _formula(reader.operand(given["condition"], index))
    then, otherwise = (reader.operand(given[name], index) for name in ("self", "other"))
    dtype = node.meta["val"].dtype
    return reader.choose(condition, reader.cast(then, dtype), reader.cast(otherwise, dtype))


@reads("masked_fill")
def _masked_fill(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    condition = _formula(reader.operand(given["mask"], index))
    value = reader.cast(reader.operand(given["value"], ()), node.meta["val"].dtype)
    return reader.choose(condition, value, reader.operand(given["self"], index))


@reads("to", "_to_copy", "type_as")
def _to(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    return reader.cast(reader.operand(given["self"], index), node.meta["val"].dtype)


# Triangles, running sums, differences


@reads("tril", "triu")
def _triangle(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    below = index[-2] + reader.size(given["diagonal"]) - index[-1]  # ≥ 0 on and below the diagonal
    kept = AtLeast(below) if node.target._opname == "tril" else AtLeast(-below)  # type: ignore[union-attr]
    return reader.choose(kept, reader.read(given["self"], index), reader.cast(ZERO, node.meta["val"].dtype))


@reads("cumsum")
def _cumsum(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    """Only of a constant: n ones up to here are position + 1 of them."""
    source = given["self"]
    dim = given["dim"] % len(index)
    counter = reader.variable("t", source.meta["val"].shape[dim])
    term = reader.read(source, (*index[:dim], counter, *index[dim + 1 :]))
    if is_formula(term):
        decided = reader.prover.simplify(term)
        term = ZERO if decided == FALSE else Linear(constant=1) if decided == TRUE else term
    if not isinstance(term, Linear) or term.value is None:
        raise Opaque
    return reader.cast((index[dim] + 1) * term.value, node.meta["val"].dtype)


@reads("diff")
def _diff(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    if given["n"] != 1 or node.meta["val"].dtype == torch.bool:
        raise Opaque
    dim = given["dim"] % len(index)
    parts = [p for p in (given["prepend"], given["self"], given["append"]) if p is not None]
    here, after = (_joined(reader, parts, dim, (*index[:dim], index[dim] + step, *index[dim + 1 :])) for step in (0, 1))
    return ARITHMETIC["sub"](after, here)


@reads("cat")
def _cat(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    parts = [p for p in given["tensors"] if p.meta["val"].dim() == len(index)]
    return _joined(reader, parts, given["dim"] % len(index), index)


def _joined(reader: Reader, parts: list[Node], dim: int, index: Index) -> Value:
    """The element of several tensors laid end to end."""
    first, *rest = parts
    if not rest:
        return reader.read(first, index)
    length = reader.size(first.meta["val"].shape[dim])
    inside = AtLeast(length - index[dim] - 1)
    if reader.prover.proves(inside):
        return reader.read(first, index)
    beyond = _joined(reader, rest, dim, (*index[:dim], index[dim] - length, *index[dim + 1 :]))
    return reader.choose(both(inside), reader.read(first, index), beyond)


# Views


@reads("unsqueeze")
def _unsqueeze(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    dim = given["dim"] % len(index)
    return reader.read(given["self"], (*index[:dim], *index[dim + 1 :]))


@reads("expand", "expand_as")
def _expand(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    return reader.operand(given["self"], index)


@reads("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze")
def _reshape(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    """Only dimensions of size 1 come or go."""
    source = given["self"]
    old, new = source.meta["val"].shape, node.meta["val"].shape
    wide = [i for i, size in zip(index, new, strict=True) if not is_one(size)]
    before = [reader.size(s) for s in old if not is_one(s)]
    if before != [reader.size(s) for s in new if not is_one(s)]:
        raise Opaque
    remaining = iter(wide)
    return reader.read(source, tuple(ZERO if is_one(s) else next(remaining) for s in old))


@reads("transpose", "permute", "t", "mT")
def _permute(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    rank = len(index)
    order = list(range(rank))
    if node.target._opname == "mT":  # type: ignore[union-attr]
        order[-2:] = order[-1], order[-2]
    elif "dims" in given:
        order = [d % rank for d in given["dims"]]
    elif rank > 1:
        a, b = given.get("dim0", 0) % rank, given.get("dim1", 1) % rank
        order[a], order[b] = order[b], order[a]
    place = [ZERO] * rank
    for position, dim in enumerate(order):
        place[dim] = index[position]
    return reader.read(given["self"], place)


@reads("slice")
def _slice(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    dim, source = given["dim"] % len(index), given["self"]
    start = _from_start(reader, given["start"] or 0, source.meta["val"].shape[dim])
    if not isinstance(given["step"], int):
        raise Opaque
    return reader.read(source, (*index[:dim], index[dim] * given["step"] + start, *index[dim + 1 :]))


@reads("select")
def _select(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    source = given["self"]
    dim = given["dim"] % (len(index) + 1)
    place = _from_start(reader, given["index"], source.meta["val"].shape[dim])
    return reader.read(source, (*index[:dim], place, *index[dim:]))


def _from_start(reader: Reader, position: Any, size: Any) -> Linear:
    """A position that may count from the end."""
    place = reader.size(position)
    if reader.at_least(place, 0):
        return place
    if reader.at_least(-place, 1) and reader.at_least(place + reader.size(size), 0):
        return place + reader.size(size)
    raise Opaque


@reads("clone", "contiguous", "alias", "detach")
def _same(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    return reader.read(given["self"], index)


@reads("index")
def _index(reader: Reader, node: Node, given: dict[str, Any], index: Index) -> Value:
    """`x[i, j]` with index tensors for the leading dimensions; those must be provably non-negative, as −1 wraps."""
    source, places = given["self"], list(given["indices"])
    while places and places[-1] is None:
        places.pop()
    if not places or any(not isinstance(p, Node) or p.meta["val"].dtype == torch.bool for p in places):
        raise Opaque
    width = len(index) - (source.meta["val"].dim() - len(places))
    found = [reader.integer(reader.operand(p, index[:width])) for p in places]
    if not all(reader.at_least(f, 0) for f in found):
        raise Opaque
    return reader.read(source, (*found, *index[width:]))
