"""The normal form of a value: sums of products of letters, under axioms.

Rotations go to the left, through picks of whole blocks and into functions that carry them, and cancel where they meet
their transposes. Two values are equal where the normal form of their difference is zero.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from .axioms import BLOCKS, CONSTANT, HEADS, LINEAR, NORM, ORTHOGONAL, PARTS, Axiom
from .functions import MEANING, Meaning, composed
from .heads import by_heads, cut_of, is_lost
from .letters import Pick, Rotation, meaning, of_row, pick


class Normal:
    """Brings values into their normal form; used: how often each axiom was.

    heads: also writes views that cut channels into heads as sums over the heads, of which slices and splits keep some.
    """

    def __init__(self, axioms: frozenset[Axiom], heads: bool = False):
        self.axioms, self.heads = axioms, heads and HEADS in axioms
        self.used: Counter[Axiom] = Counter()
        self._normal: set[sympy.Expr] = set()

    def __call__(self, value: sympy.Expr) -> sympy.Expr:
        while value not in self._normal:
            terms = sympy.Add.make_args(sympy.expand(value))
            made = sympy.expand(sympy.Add(*map(self._term, terms)))
            if made == value:
                self._normal.add(value)
            value = made
        return value

    def _term(self, term: sympy.Expr) -> sympy.Expr:
        commuting, rest = term.args_cnc()
        factors = [f for factor in rest for f in _flat(factor)]
        while (changed := self._step(factors)) is not None:
            factors = changed
        return sympy.Mul(*commuting, *map(self._inside, factors))

    def _step(self, factors: list[sympy.Expr]) -> list[sympy.Expr] | None:
        """The factors after one use of an axiom; None where none applies."""
        for i, (a, b) in enumerate(zip(factors, factors[1:], strict=False)):
            found = self._pair(a, b)
            if found is not None:
                return [*factors[:i], *found, *factors[i + 2 :]]
        return None

    def _pair(self, a: sympy.Expr, b: sympy.Expr) -> list[sympy.Expr] | None:
        (first, turned), (second, back) = meaning(a), meaning(b)
        if isinstance(first, Rotation) and sympy.transpose(a) == b and first.is_orthogonal:
            return self._use(ORTHOGONAL, [])
        if isinstance(first, Pick) and isinstance(second, Pick):
            return self._picks(first, second, turned, back)
        if isinstance(first, Pick) and isinstance(second, Rotation) and _whole(first, second.block):
            return self._use(BLOCKS, [b, a])
        if isinstance(a, AppliedUndef) and not isinstance(b, AppliedUndef):
            return self._into(a, b, second)
        return None

    def _picks(self, first: Pick, second: Pick, turned: bool, back: bool) -> list[sympy.Expr] | None:
        if turned and not back:
            start, end = max(first.start, second.start), min(first.end, second.end)
            if start >= end:
                return self._use(PARTS, [sympy.S.Zero])
            left = pick(first.end - first.start, start - first.start, end - first.start)
            right = pick(second.end - second.start, start - second.start, end - second.start)
            return self._use(PARTS, [f for f in (left, sympy.transpose(right)) if f != 1])
        if not turned and not back:
            return self._use(PARTS, [pick(first.width, first.start + second.start, first.start + second.end)])
        return None

    def _into(self, f: sympy.Expr, by: sympy.Expr, what: Any) -> list[sympy.Expr] | None:
        """f(x)·M as f(x·M)."""
        means = MEANING[f.func.__name__]
        if means.axiom is None or by.has(AppliedUndef) or any(of_row(s) for s in by.free_symbols):
            return None
        if means.sizes is not None:
            whole = isinstance(what, Rotation) and all(_divides(what.block, sizes[-1]) for sizes in means.sizes)
            allowed = means.sizes[0][-1] == "*" or whole
        else:
            allowed = means.axiom is not NORM or (isinstance(what, Rotation) and what.is_orthogonal)
        if not allowed:
            return None
        operands = [x * by if i in means.carried else x for i, x in enumerate(f.args)]
        return self._use(means.axiom, [f.func(*operands)])

    def _inside(self, factor: sympy.Expr) -> sympy.Expr:
        """A factor whose operands are in normal form."""
        if isinstance(factor, sympy.transpose):
            return sympy.transpose(self._inside(factor.args[0]))
        if not isinstance(factor, AppliedUndef):
            return factor
        means, operands = MEANING[factor.func.__name__], []
        for i, x in enumerate(factor.args):
            before = self.used[ORTHOGONAL]
            operands.append(self(x))
            if means.first is not None and i == 0 and self.used[ORTHOGONAL] > before:
                self.used[means.first] += 1
        return self._spread(factor, means, operands)

    def _spread(self, f: sympy.Expr, means: Meaning, operands: list[sympy.Expr]) -> sympy.Expr:
        """f of sums as a sum over its operands' terms."""
        if not means.linear or LINEAR not in self.axioms:
            return f.func(*operands)
        found: list[sympy.Expr] = []
        for i in means.carried:
            for term in sympy.Add.make_args(operands[i]):
                number, rest = term.as_coeff_Mul()
                if rest == 0 or number == 0:
                    continue
                if means.picks and CONSTANT in self.axioms and _is_constant(rest):
                    self.used[CONSTANT] += 1
                    found.append(term)
                    continue
                alone = [sympy.S.Zero if j in means.carried else x for j, x in enumerate(operands)]
                alone[i] = rest
                if self.heads and means.moves is not None and is_lost(means.moves, rest):
                    self.used[PARTS] += 1
                    continue
                if self.heads and means.sizes is not None and (cut := cut_of(means.sizes)):
                    self.used[HEADS] += 1
                    found.append(number * by_heads(rest, means.sizes, cut))
                    continue
                within = MEANING[rest.func.__name__].sizes if isinstance(rest, AppliedUndef) else None
                if within is not None and means.sizes is not None:
                    found.append(number * composed(rest.args[0], within, means.sizes))
                else:
                    found.append(number * f.func(*alone))
        if len(found) > 1:
            self.used[LINEAR] += 1
        return sympy.Add(*found)

    def _use(self, axiom: Axiom, found: list[sympy.Expr]) -> list[sympy.Expr] | None:
        if axiom not in self.axioms:
            return None
        self.used[axiom] += 1
        return found


def _flat(factor: sympy.Expr) -> list[sympy.Expr]:
    """H² as H·H."""
    if factor.is_Pow and factor.exp.is_Integer and factor.exp > 0:
        return [factor.base] * int(factor.exp)
    return [factor]


def _is_constant(value: sympy.Expr) -> bool:
    """Whether a product is the same row again and again: a vector, and what multiplies all rows alike."""
    first = (value.args if value.is_Mul else (value,))[0]
    alike = not value.has(AppliedUndef) and not any(of_row(s) for s in value.free_symbols)
    return alike and meaning(first) == ("vector", False)


def _whole(channels: Pick, block: int) -> bool:
    return not any(n % block for n in (channels.width, channels.start, channels.end))


def _divides(block: int, size: str) -> bool:
    return size.isdecimal() and int(size) % block == 0
