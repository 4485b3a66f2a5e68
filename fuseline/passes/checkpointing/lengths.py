"""A plan's lengths: what it takes at others than the one it was made for, and the longest at which it holds its limit.

A plan that was made for one length is right at any other, but may take more than the limit there. Where the length is a
symbol, `hold_limit` bounds it by a guard: a longer sequence is captured again, and gets a plan of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import sympy
from torch.fx import Node

from ...compiler.compat import size_hint, symbolic_expression
from ...compiler.compat_joint import hold_at_most, is_tangent
from ...compiler.costs import bytes_of, is_attention
from ...compiler.errors import UserError
from ...compiler.program import Program
from ...compiler.tape import At, Execution, Tape, value_at
from .policies import Problem, gigabytes
from .scaling import rows_of

LONGEST = 2**40
"""Lengths from here on count as no limit."""

log = logging.getLogger("fuseline")


def owned_sizes(found: Tape) -> list[Any]:
    """Bytes of each thing that the caller owns (parameters, buffers, inputs), as formulas in the size symbols."""
    owned = [n for n in found.nodes if n.op == "placeholder" and not is_tangent(n)]
    return [bytes_of(n.meta.get("val")) for n in owned]


def input_bytes(found: Tape, at: At) -> float:
    """Bytes of what the caller owns: parameters, buffers and inputs."""
    return sum(value_at(size, at) for size in owned_sizes(found))


def symbolic_sizes(program: Program) -> dict[Any, Any]:
    """Every size symbol of the inputs → a size that it is."""
    found: dict[Any, Any] = {}
    for node in program.placeholders:
        value = node.meta.get("val")
        for size in getattr(value, "shape", (value,)):
            expression = symbolic_expression(size)
            if getattr(expression, "is_Symbol", False):
                found.setdefault(expression, size)
    return found


def hints(program: Program) -> At:
    """The sizes that symbols had at capture."""
    return {symbol: size_hint(size) for symbol, size in symbolic_sizes(program).items()}


def sequence_symbol(found: Tape) -> Any:
    """The symbol of the sequence's length: of attention's queries, or the only one there is; None where it is fixed."""
    for i in found.forward:
        node: Node = found.nodes[i]
        if is_attention(node):
            query = node.args[0].meta["val"]  # type: ignore[union-attr]
            symbols = [e for s in query.shape[-2:-1] if (e := symbolic_expression(s)) is not s and e.free_symbols]
            if symbols:
                return sorted(symbols[0].free_symbols, key=str)[0]
    return found.symbols[0] if len(found.symbols) == 1 else None


def reach(problem: Problem, execution: Execution, symbol: Any, size: float) -> int:
    """The longest sequence at which a schedule, with all that the caller owns, stays within `size` bytes; 0 for none.

    What it takes must not shrink with the length: see `grows`.
    """
    rows = rows_of(problem.sections, execution)

    def fits(length: int) -> bool:
        at = {**problem.at, symbol: length}
        taken = float((rows @ problem.tape.size_values(at)).max(initial=0.0))
        return taken + input_bytes(problem.tape, at) <= size

    low, high = 0, 1
    while high < LONGEST and fits(high):
        low, high = high, 2 * high
    if high >= LONGEST:
        return LONGEST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def grows(sizes: Iterable[Any]) -> bool:
    """Whether it is proved of each size, a formula in symbols that are at least 1, that it shrinks with none of them.

    Polynomials are proved by their coefficients around 1; a floor by a positive number is as good as what it is of.
    """
    return all(isinstance(size, (int, float)) or _grows(sympy.sympify(size)) for size in sizes)


def _grows(size: Any) -> bool:
    floors = {}
    for call in size.atoms(sympy.Function):
        divides = call.func.__name__ in ("FloorDiv", "CleanDiv") and len(call.args) == 2
        if divides and call.args[1].is_number and call.args[1] > 0 and _grows(call.args[0]):
            floors[call] = sympy.Dummy(nonnegative=True)
    symbols = size.free_symbols
    body = size.xreplace(floors)
    variables = sorted(body.free_symbols, key=str)
    if not variables:
        return True
    if body.atoms(sympy.Function) or not body.is_polynomial(*variables):
        return False
    around = body.subs({s: s + 1 for s in symbols}, simultaneous=True)
    return all(c >= 0 for powers, c in sympy.Poly(around, *variables).terms() if any(powers))


def hold_limit(program: Program, problem: Problem, execution: Execution, size: float) -> int:
    """Guards the sizes at which a schedule stays within `size` bytes: the sequence's length as far as it goes, any
    other symbol as far as the plan was made for. Returns the longest sequence; 0 where only this one is known to fit.

    Raises:
        UserError: the step at hand is longer than the plan reaches, as one for a shorter `target_seq` can be.
    """
    tape = problem.tape
    found = symbolic_sizes(program)
    if not found:
        return 0
    if not grows([*tape.sizes, *owned_sizes(tape)]):
        lengths = ", ".join(f"{s} = {v}" for s, v in problem.at.items())
        log.warning("checkpoint holds %s at %s alone: some size is not known to grow", gigabytes(size), lengths)
        return 0
    symbol = sequence_symbol(tape)
    bounds = dict(problem.at)
    if symbol is not None:
        bounds[symbol] = reach(problem, execution, symbol, size)
    for one, value in found.items():
        if size_hint(value) > bounds[one]:
            raise UserError(
                f"checkpoint's plan holds {gigabytes(size)} up to {bounds[one]:,} tokens; this step has "
                f"{size_hint(value):,}",
                remedy="target_seq= of the longest sequence, or without target_seq",
            )
        if bounds[one] < LONGEST:
            hold_at_most(value, bounds[one])
    return bounds.get(symbol, 0)
