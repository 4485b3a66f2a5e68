"""Linear algebra's own ops.

linear(x, W, b) is x·Wᵀ + b, a @ b is a·b, a product with a vector x·diag(w), a slice of channels x·P, an embedding its
ids' unit rows times the table. A cast between floating-point types is left out. A column is written as the row that it
is the transpose of: W·xᵀ as x·Wᵀ, in another shape.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import sympy
from torch.fx import Node

from .functions import Meaning, function, view
from .letters import centre, letter, ones, pick
from .matrices import joined, number
from .region import EMPTY, is_zero

if TYPE_CHECKING:
    from .values import Call

SAME = ("to", "_to_copy", "type_as", "clone", "contiguous", "detach", "alias")
_VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
_PRODUCTS = ("mm", "matmul", "bmm", "_grouped_mm", "grouped_mm", "grouped_mm_fallback")
_TURNS = ("transpose", "t", "swapaxes", "swapdims", "mT", "numpy_T")
_SPLITS = ("split", "chunk", "split_with_sizes")


def linear(call: Call) -> sympy.Expr | None:
    """A call's value, where linear algebra has it; else None."""
    name, args = call.name, call.args
    if is_zero(call.node):
        return sympy.S.Zero
    if name in (*EMPTY, "ones", "new_ones"):
        made = call.node.meta["val"]
        return function(f"{name.removeprefix('new_')}[{','.join(call.shape())},{made.dtype}]", [], Meaning())
    if name in SAME:
        return _cast(call)
    if name in _VIEWS and args[0].meta["val"].dtype == call.node.meta["val"].dtype:
        return view(call.value(0), call.shape(args[0]), call.shape())
    if (order := order_of(call)) is not None:
        return _turned(call, order)
    if name == "linear" and call.rank(args[1]) == 2:
        bias = call.value(2) if len(args) > 2 and args[2] is not None else sympy.S.Zero
        return call.value(0) * sympy.transpose(call.value(1)) + bias
    if name in _PRODUCTS:
        return _product(call)
    if name in ("addmm", "baddbmm") and not call.kwargs:
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


def _cast(call: Call) -> sympy.Expr:
    before, after = (node.meta["val"] for node in (call.args[0], call.node))
    if before.dtype == after.dtype or (before.is_floating_point() and after.is_floating_point()):
        return call.value(0)
    return function(f"cast[{before.dtype}→{after.dtype}]", [call.value(0)], Meaning())


def order_of(call: Call) -> list[int] | None:
    """Of a transpose or a permutation, where each dimension of the result comes from."""
    if call.name not in (*_TURNS, "permute"):
        return None
    rank = call.rank()
    if call.name == "permute":
        return [d % rank for d in call.args[1]]
    order = list(range(rank))
    if len(call.args) == 1 and rank < 2:
        return order
    a, b = (d % rank for d in (call.args[1:] or (-2, -1)))
    order[a], order[b] = b, a
    return order


def _turned(call: Call, order: list[int]) -> sympy.Expr | None:
    rank = len(order)
    if order == sorted(order):
        return call.value(0)
    return sympy.transpose(call.value(0)) if order == [*range(rank - 2), rank - 1, rank - 2] else None


def _product(call: Call) -> sympy.Expr | None:
    """a @ b, of matrices or of stacks; a grouped product has a matrix of a stack of weights for each row."""
    a, b, *grouped = [*call.args, *call.kwargs.values()]
    if grouped:
        weight = call.values.is_weight(b)
        return call.value(a) * call.values.matrices.chosen(call.value(b), call.text(grouped)) if weight else None
    if call.rank(b) < 2 or (call.rank(a) < 2 < call.rank(b)):
        return None
    if call.shape(b)[-1] != "1" or call.rank(a) < 2:
        return call.value(a) * call.value(b)
    turned = lambda shape: (*shape[:-2], shape[-1], shape[-2])
    row = view(call.value(b), call.shape(b), turned(call.shape(b)))
    return view(row * sympy.transpose(call.value(a)), turned(call.shape()), call.shape())


def _sum(call: Call) -> sympy.Expr | None:
    a, b = call.args
    if not call.is_tensor(a):
        return None
    sign = 1 if call.name == "add" else -1
    if isinstance(b, (int, float)):
        fixed = call.shape()[-1:] and call.shape()[-1].isdecimal()
        return call.value(a) + sign * number(b) * ones(call.width()) if fixed else None
    if not call.is_tensor(b):
        return None
    if call.name == "sub" and _is_mean(call, b, a):
        return call.value(a) * centre(call.width(a))
    if call.shape(a)[-1:] != call.shape(b)[-1:]:
        return None
    return call.value(a) + sign * call.value(b)


def _is_mean(call: Call, node: Node, of: Node) -> bool:
    """Whether a node is the mean of the channels of another, one a row."""
    mean = call.of(node)
    if mean is None or mean.name != "mean" or mean.kwargs or len(mean.args) != 3 or mean.args[0] is not of:
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
    """An item of a split: some channels, some rows of a weight, or rows by another rule."""
    split, position = call.args
    cut = call.of(split)
    if cut is None or cut.name not in (*_SPLITS, "unbind"):
        return None
    x, *rest = cut.args
    known = len(rest) == (1 if cut.name == "unbind" else 2)
    rank = call.rank(x)
    dim = int(rest[-1] if known else cut.kwargs.get("dim", 0)) % rank
    pieces = split.meta["val"]
    if cut.name == "unbind":
        return (
            None
            if dim == rank - 1
            else call.rows([x], [dim, position], moves=lambda x: x.select(dim, position), name="select")
        )
    sizes = [piece.shape[dim] for piece in pieces]
    if dim != rank - 1 and not call.values.is_weight(x):
        moves = lambda x: x.split([int(size) for size in sizes], dim)[position]
        return call.rows([x], [dim, sizes, position], moves=moves, name="split")
    start = sum(sizes[:position])
    return call.values.matrices.sliced(call.value(x), tuple(x.meta["val"].shape), dim, start, start + sizes[position])


def _joined(call: Call) -> sympy.Expr | None:
    tensors, dim = (*call.args, 0)[:2]
    rank = call.rank()
    if dim % rank != rank - 1:
        return None
    return joined([(call.value(t), call.width(t)) for t in tensors], -1, (0,))
