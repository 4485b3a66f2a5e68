"""What the rewrites of `rotate` rest on, for their proof (`compiler/algebra`).

Said anew, op by op, and not asked of `carriers.py`: what a proof takes over from the code it checks it does not check.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.algebra import letters
from ...compiler.algebra.axioms import ALL, NORM, ROWS, SCORES, Algebra, Translator
from ...compiler.algebra.functions import Meaning, function
from ...compiler.algebra.region import NotTranslated
from ...compiler.algebra.values import Call
from ...compiler.expressions import Constant
from ...compiler.traits import arguments


def rms_norm(call: Call) -> sympy.Expr:
    """rms(x)·diag(w), or rms(x)·(1 + diag(w))."""
    _, weight, eps, unit = [*call.args, *[False] * (4 - len(call.args))][:4]
    made = _rms(call, call.args[0], eps, call.value(0))
    if weight is None:
        return made
    scale = _diagonal(call, weight)
    return made * (scale + 1 if unit else scale)


def layer_norm(call: Call) -> sympy.Expr:
    """rms(x·C)·diag(w) + b: the variance is the mean square of what is left when the mean is taken away."""
    x, weight, bias, eps = call.args
    made = _rms(call, x, eps, call.value(x) * letters.centre(call.width(x)))
    scaled = made if weight is None else made * _diagonal(call, weight)
    return scaled if bias is None else scaled + call.value(bias)


def _rms(call: Call, x: Any, eps: float, value: sympy.Expr) -> sympy.Expr:
    return function(f"rms[{eps}]", [value], Meaning(NORM, (0,)))


def _diagonal(call: Call, weight: Any) -> sympy.Expr:
    if "weight" in weight.meta:
        return call.values.matrices.diagonal(weight.meta["weight"])
    return letters.letter(f"diag({call.text(weight)})", symmetric=True)


def hadamard(call: Call) -> sympy.Expr:
    """x·H, where the core is the one that makes it the H of weight expressions."""
    given: list[Any] = [*call.args, *[None, 0, False][len(call.args) - 1 :]]
    x, core, block, signs = given
    n = block or call.width(x)
    letter, eye = letters.hadamard(n), torch.eye(n, dtype=torch.float64)
    expression = None if core is None else core.meta.get("weight")
    if core is not None and (expression is None or expression.parameters()):
        raise NotTranslated("op hadamard: its core is no constant")
    matrix = None if expression is None else expression.evaluate(lambda name: torch.empty(0))
    if (ops.hadamard(eye, matrix, n, signs) - letters.MEANING[letter].matrix()).abs().max() > 1e-12:  # type: ignore[union-attr]
        raise NotTranslated("op hadamard: its core is not that of weight expressions")
    return call.value(0) * letter


def attention(call: Call) -> sympy.Expr:
    """A function of the products q·kᵀ that mixes the rows of v."""
    q, k, v, *rest = call.args
    drops = call.kwargs.get("dropout_p", (*rest, None, 0.0)[1])
    if call.name == "scaled_dot_product_attention" and drops != 0.0:
        raise NotTranslated(f"op {call.name}: it drops at random")
    scores = call.value(q) * sympy.transpose(call.value(k))
    return call.rows([v], [*rest, *sorted(call.kwargs.items())], others=[scores], first=SCORES)


def moe(call: Call) -> sympy.Expr:
    """Each row times its experts' matrices: a function of x·gate_upᵀ, times downᵀ, whose rows are mixed by weights."""
    given = arguments(call.node)
    _, indices, weights, *_ = call.args
    chosen, rest = call.text(indices), [given[name] for name in ("activation", "interleaved", "alpha", "limit")]
    stack = lambda at: call.values.matrices.chosen(sympy.transpose(call.value(at)), chosen)
    bias = lambda at: call.value(at) if len(call.args) > at and call.args[at] is not None else sympy.S.Zero
    inner = function(f"unit[{chosen},{rest}]", [call.value(0) * stack(3), bias(5)], Meaning())
    rows = inner * stack(4) + letters.letter(f"unit({chosen})", meaning="row") * bias(6)
    return function(f"moe[{chosen},{call.text(weights)}]", [rows], Meaning(ROWS, (0,), True))


def dropout(call: Call) -> sympy.Expr | None:
    """x, where nothing is dropped."""
    _, p, train = (*call.args, None, None)[:3]
    return call.value(0) if p == 0.0 or train is False else None


def _along(
    *positions: int, picks: bool = False, operands: Callable[[Call], Sequence[Any]] = lambda call: call.args[:1]
) -> Translator:
    """An op along the dimensions that these arguments name, which may not be that of the channels."""

    def translated(call: Call) -> sympy.Expr | None:
        carried, rank = operands(call), call.rank(call.args[0]) if call.is_tensor(call.args[0]) else call.rank()
        if len(call.args) <= max(positions) and call.name not in ("cat", "stack"):
            return None  # along all dimensions
        dims = [(*call.args, *[0] * max(positions))[p] for p in positions]
        flat = [d for dim in dims for d in (dim if isinstance(dim, (list, tuple)) else [dim])]
        if not flat or any(not isinstance(d, int) or d % rank == rank - 1 for d in flat):
            return None
        rest = [a for a in call.args if not any(a is c for c in carried) and not isinstance(a, (list, tuple))]
        listed = [a for a in call.args if isinstance(a, (list, tuple)) and not any(c in a for c in carried)]
        alone = picks and not any(isinstance(a, Node) for a in call.args[1:])
        moves = (lambda x: call.node.target(x, *call.args[1:])) if alone else picks
        return call.rows(carried, [*rest, *listed, *sorted(call.kwargs.items())], moves=moves)

    return translated


def permute(call: Call) -> sympy.Expr | None:
    x, order = call.args
    moves = lambda x: x.permute(order)
    return call.rows([x], [order], moves=moves) if order[-1] % call.rank() == call.rank() - 1 else None


def expand(call: Call) -> sympy.Expr | None:
    x = call.args[0]
    return call.rows([x], call.shape()[:-1], moves=True) if call.shape(x)[-1:] == call.shape()[-1:] else None


def repeat(call: Call) -> sympy.Expr | None:
    x, times = call.args
    return call.rows([x], [times], moves=True) if times[-1] == 1 else None


def index(call: Call) -> sympy.Expr | None:
    """Rows by their numbers; one of a constant as a slice."""
    x, indices = call.args[:2]
    *before, last = indices
    number = last.meta.get("weight") if call.is_tensor(last) and not _is_mask(last) else None
    if isinstance(number, Constant) and number.shape == (1,) and not any(before):
        start = int(number.values[0])
        if len(before) < call.rank(x) - 1:
            return call.rows([x], [len(before), start, start + 1 or None], moves=True, name="slice")
        width = call.width(x)
        return call.value(x) * letters.pick(width, start % width, start % width + 1)
    return call.rows([x], indices, moves=True) if _picks_rows(call, x, indices) else None


def sliced(call: Call) -> sympy.Expr | None:
    """Rows from one to another."""
    given: list[Any] = [*call.args, *[0, None, None, 1][len(call.args) - 1 :]]
    x, dim, start, end, step = given
    rank = call.rank(x)
    if dim % rank == rank - 1:
        return None
    rest = [dim % rank, start or 0, None if end == sys.maxsize else end, *([] if step == 1 else [step])]
    fixed = not any(isinstance(a, Node) for a in given[1:])
    moves = (lambda x: torch.ops.aten.slice.Tensor(x, *given[1:])) if fixed else True
    return call.rows([x], rest, moves=moves)


def _picks_rows(call: Call, x: Any, indices: Sequence[Any]) -> bool:
    """Whether indices leave the last dimension whole; a mask stands for as many dimensions as it has."""
    taken = sum(call.rank(i) if call.is_tensor(i) and _is_mask(i) else 1 for i in indices)
    return taken < call.rank(x) or (taken == call.rank(x) and indices[-1] is None)


def _is_mask(index: Node) -> bool:
    return index.meta["val"].dtype in (torch.bool, torch.uint8)


def index_put(call: Call) -> sympy.Expr | None:
    x, indices, values, *rest = call.args
    whole = _picks_rows(call, x, indices)
    return call.rows([x, values], [indices, rest]) if whole and call.shape(x)[-1:] == call.shape(values)[-1:] else None


def scaled(call: Call) -> sympy.Expr | None:
    """x times, or through, one number for all channels of a row."""
    if call.kwargs or len(call.args) != 2 or not all(map(call.is_tensor, call.args)):
        return None
    a, b = call.args
    if call.is_alike(b) and not call.is_alike(a):
        return call.rows([a], [b])
    return call.rows([b], [a]) if call.name == "mul" and call.is_alike(a) and not call.is_alike(b) else None


def masked_fill(call: Call) -> sympy.Expr | None:
    x, mask, filler = call.args
    return call.rows([x], [mask]) if filler == 0 and call.is_alike(mask) else None


def where(call: Call) -> sympy.Expr | None:
    condition, *values = call.args
    if not call.is_alike(condition) or not all(call.is_tensor(v) or v == 0 for v in values):
        return None
    return call.rows([v for v in values if call.is_tensor(v)], [condition, [call.is_tensor(v) for v in values]])


_CALLS: dict[str, Translator] = {
    "rms_norm": rms_norm,
    "layer_norm": layer_norm,
    "hadamard": hadamard,
    **dict.fromkeys(("attention", "scaled_dot_product_attention"), attention),
    "moe": moe,
    "dropout": dropout,
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), _along(1, 2, picks=True)),
    **dict.fromkeys(("select", "narrow", "index_select"), _along(1, picks=True)),
    **dict.fromkeys(("sum", "mean", "cumsum"), _along(1)),
    "slice": sliced,
    "repeat": repeat,
    "repeat_interleave": _along(2, picks=True),
    **dict.fromkeys(("cat", "stack"), _along(1, operands=lambda call: call.args[0])),
    "index_add": _along(1, operands=lambda call: (call.args[0], call.args[3])),
    "permute": permute,
    **dict.fromkeys(("expand", "expand_as"), expand),
    "index": index,
    "index_put": index_put,
    **dict.fromkeys(("mul", "div"), scaled),
    "masked_fill": masked_fill,
    "where": where,
}

ALGEBRA = Algebra(ALL, _CALLS)
