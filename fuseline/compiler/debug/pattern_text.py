"""A pattern as pseudo-Python, the parts that did not fit marked.

h * rsqrt(mean(pow(h, 2), dim=dims, keepdim=True) + eps)
                      ^
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ..pattern import Call, Either, Misfit, Scalar, Through, Var

_SIGNS = {"add": ("+", 1), "sub": ("-", 1), "mul": ("*", 2), "div": ("/", 2), "matmul": ("@", 2)}
_NEGATION, _WHOLE = 3, 9
_OPEN, _CLOSE = "\x01", "\x02"


class Step(NamedTuple):
    """A part of the pattern held against a value; misfit: why they do not fit; skipped: nothing below was tried."""

    term: Any
    value: Any
    misfit: Misfit | None = None
    skipped: bool = False


def marked(steps: Sequence[Step]) -> tuple[str, str]:
    """The pattern in the spelling that was tried, and a line of `^` under what did not fit."""
    text = _Printer(steps).text()
    plain, marks, depth = [], [], 0
    for character in text:
        if character in (_OPEN, _CLOSE):
            depth += 1 if character == _OPEN else -1
        else:
            plain.append(character)
            marks.append("^" if depth else " ")
    return "".join(plain), "".join(marks).rstrip()


def text_of(term: Any) -> str:
    """A pattern in its first spelling."""
    return _Printer([]).fresh(term)[0]


class _Printer:
    """Reads steps in the order in which the matcher makes them: a term, then its operands."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = list(steps)
        self.place = 0

    def text(self) -> str:
        return self.next()[0]

    def next(self) -> tuple[str, int]:
        """The text of the next term, and how strongly it binds."""
        step = self.steps[self.place]
        self.place += 1
        misfits = list(self._misfits(step.term))
        if any(m.misfit is not None and m.misfit.kind == "extra" for m in misfits):
            text, strength = self.next()
            return _mark(text), strength
        failed = [m.misfit.kind for m in misfits if m.misfit is not None]
        if any(m.skipped for m in misfits):
            text, strength = self.fresh(step.term)
            return _mark(text), strength
        if isinstance(step.term, (Either, Through)):
            return self.next()
        if not isinstance(step.term, Call):
            text, strength = _leaf(step.term), _WHOLE
            return (_mark(text) if failed else text), strength
        wrong = {m.misfit.name for m in misfits if m.misfit is not None and m.misfit.kind in ("option", "variable")}
        if "absent" in failed:
            first = self.next()
            rest = [self.fresh(operand) for operand in step.term.operands[1:]]
            return _call(step.term, [first, *rest], True, wrong)
        operands = [self._operand(operand) for operand in step.term.operands]
        return _call(step.term, operands, bool({"op", "written", "count"} & set(failed)), wrong)

    def _misfits(self, term: Any) -> Iterator[Step]:
        while self.place < len(self.steps):
            step = self.steps[self.place]
            if step.term is not term or step.misfit is None:
                return
            self.place += 1
            yield step

    def _operand(self, operand: Any) -> tuple[str, int]:
        if isinstance(operand, (list, tuple)):
            return f"[{', '.join(self._operand(o)[0] for o in operand)}]", _WHOLE
        return self.next()

    def fresh(self, term: Any) -> tuple[str, int]:
        if isinstance(term, (list, tuple)):
            return f"[{', '.join(self.fresh(t)[0] for t in term)}]", _WHOLE
        if isinstance(term, Either):
            return self.fresh(term.alternatives[0])
        if isinstance(term, Through):
            return self.fresh(term.x)
        if isinstance(term, Call):
            return _call(term, [self.fresh(o) for o in term.operands], False, set())
        return _leaf(term), _WHOLE


def _call(term: Call, operands: Sequence[tuple[str, int]], wrong_op: bool, wrong: set[str]) -> tuple[str, int]:
    op = term.ops[0]
    if op in _SIGNS and len(operands) == 2 and not term.options:
        sign, strength = _SIGNS[op]
        left, right = _inside(operands[0], strength), _inside(operands[1], strength + (not term.commutative))
        return f"{left} {_mark(sign) if wrong_op else sign} {right}", strength
    if op == "neg" and not term.options:
        return f"{_mark('-') if wrong_op else '-'}{_inside(operands[0], _NEGATION)}", _NEGATION
    given = [text for text, _ in operands]
    for name, value in term.options.items():
        text = f"{name}={value.name if isinstance(value, (Var, Scalar)) else repr(value)}"
        bad = name in wrong or (isinstance(value, (Var, Scalar)) and value.name in wrong)
        given.append(_mark(text) if bad else text)
    return f"{_mark(op) if wrong_op else op}({', '.join(given)})", _WHOLE


def _inside(operand: tuple[str, int], strength: int) -> str:
    text, own = operand
    return f"({text})" if own < strength else text


def _leaf(term: Any) -> str:
    return term.name if isinstance(term, (Var, Scalar)) else f"{term:g}" if isinstance(term, float) else repr(term)


def _mark(text: str) -> str:
    return f"{_OPEN}{text.replace(_OPEN, '').replace(_CLOSE, '')}{_CLOSE}"
