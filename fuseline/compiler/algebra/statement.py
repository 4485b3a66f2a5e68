"""Statements: what a rewrite claims, `before = after`, whether it is proved, from what, and how well it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.core.function import AppliedUndef

from ..program import Program
from . import numeric
from .axioms import Algebra
from .functions import MEANING as FUNCTIONS, Meaning
from .heads import cut_of
from .letters import MEANING, Rotation
from .matrices import Matrices
from .normal import Normal
from .region import NotTranslated, Region
from .values import Values

PROVED, OPEN = "proved", "not proved"


@dataclass
class Statement:
    """What rewrites of one kind claim.

    text: `before = after` in letters (`letters.py`); status: "proved", "not proved", or "not translated: …" with the
    op that nothing is known of; left: the normal form of before − after, where it is not zero; axioms: how often each
    was used, by its text; rotations: the letters of the orthogonal matrices in it; error: max|Δ|/max|before| on random
    float64 numbers, None where they could not be computed, for `reason`. count: how many rewrites claim it; sites:
    where.
    """

    rule: str
    text: str = ""
    status: str = OPEN
    left: str | None = None
    axioms: dict[str, int] = field(default_factory=dict)
    rotations: tuple[str, ...] = ()
    error: float | None = None
    reason: str | None = None
    count: int = 0
    sites: list[str] = field(default_factory=list)

    @property
    def is_proved(self) -> bool:
        """By algebra, and by numbers."""
        return self.status == PROVED and self.error is not None and self.error <= numeric.BOUND

    def says(self, other: Statement) -> bool:
        """Whether another says the same, of other sizes perhaps, and both are proved."""
        return self.is_proved and other.is_proved and (self.rule, self.text) == (other.rule, other.text)


def state(rule: str, region: Region, program: Program, algebra: Algebra) -> Statement:
    """The statement of a region, judged."""
    made = Statement(rule)
    try:
        _judge(made, region, program, algebra)
    except NotTranslated as reason:
        made.status = f"not translated: {reason}"
    except Exception as error:  # a call in a form that nobody has thought of
        made.status = f"not translated: {type(error).__name__}: {error}"
    try:
        made.error = numeric.difference(region, program)
    except Exception as error:  # an op that cannot run on such numbers
        made.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return made


def _judge(made: Statement, region: Region, program: Program, algebra: Algebra) -> None:
    shapes = {n: tuple(program.sources[n].tensor.shape) for w in region.weights for n in w.meta["weight"].parameters()}
    matrices, normal = Matrices(shapes), Normal(algebra.axioms)
    before, after = (Values(region, side, matrices, algebra)(side.root) for side in region.sides)
    made.text = f"{show(before)} = {show(after)}"
    symbols = before.free_symbols | after.free_symbols
    made.rotations = tuple(sorted(str(s) for s in symbols if isinstance(MEANING.get(s), Rotation)))
    left = normal(before - after)
    if left != 0 and any(f.sizes is not None and cut_of(f.sizes) for f in _meanings(left)):
        by_heads = Normal(algebra.axioms, heads=True)
        if by_heads(left) == 0:
            left, normal.used = sympy.S.Zero, normal.used + by_heads.used
    made.axioms = {axiom.text: count for axiom, count in normal.used.items()}
    if left == 0:
        made.status = PROVED
        return
    made.left = show(left)
    names = {f.func.__name__ for f in left.atoms(AppliedUndef)}
    unknown = {name.partition("(")[0] for name in names if FUNCTIONS[name].axiom is None}
    if unknown:
        made.status = f"not translated: op {', '.join(sorted(unknown))}"


def _meanings(value: sympy.Expr) -> list[Meaning]:
    return [FUNCTIONS[f.func.__name__] for f in value.atoms(AppliedUndef)]


def show(value: sympy.Expr) -> str:
    """A value as one writes it: products with a dot, transposes with ᵀ."""
    if value.is_Add:
        first, *rest = map(show, value.args)
        return first + "".join(f" − {t[1:]}" if t.startswith("−") else f" + {t}" for t in rest)
    if value.is_Mul:
        number, rest = value.as_coeff_Mul()
        factors = [f"({show(f)})" if f.is_Add else show(f) for f in (rest.args if rest.is_Mul else (rest,))]
        sign = "−" if number < 0 else ""
        return sign + "·".join([*([] if abs(number) == 1 else [_number(abs(number))]), *factors])
    if value.is_Pow:
        return "·".join([show(value.base)] * int(value.exp)) if value.exp.is_Integer and value.exp > 0 else str(value)
    if isinstance(value, sympy.transpose):
        inner: Any = value.args[0]
        return f"{show(inner)}ᵀ" if not (inner.is_Add or inner.is_Mul) else f"({show(inner)})ᵀ"
    if isinstance(value, AppliedUndef):
        return f"{value.func.__name__}({', '.join(map(show, value.args))})"
    return _number(value) if value.is_Number else str(value)


def _number(value: sympy.Expr) -> str:
    return f"{float(value):g}"
