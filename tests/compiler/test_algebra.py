"""The normal form of values, by numbers; and a pass of one's own that is proved, or not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import sympy
import torch
from hypothesis import given, strategies as st
from sympy.core.function import AppliedUndef

import fuseline
import tests.strategies  # noqa: F401  the profile of the project's fuzz tests
from fuseline.compiler.algebra import letters
from fuseline.compiler.algebra.axioms import ALL, HEADS, NORM, ROWS, Algebra
from fuseline.compiler.algebra.functions import Meaning, function, view
from fuseline.compiler.algebra.letters import Pick, Rotation
from fuseline.compiler.algebra.normal import Normal
from fuseline.compiler.algebra.statement import show
from fuseline.compiler.expressions import Add, Expression
from fuseline.compiler.framework import Pass
from fuseline.compiler.program import Program
from fuseline.compiler.rewriter import Rewriter

aten = torch.ops.aten
ROW = letters.letter("x1", meaning="row")
WIDE = [letters.hadamard(4), letters.orthogonal(4, 1), letters.signs(8, 2), letters.centre(8), letters.letter("W8")]
NARROW = [letters.hadamard(4), letters.orthogonal(4, 1), letters.letter("W4")]


@cache
def drawn(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def matrix(factor: sympy.Expr, width: int) -> torch.Tensor:
    """A letter's matrix on rows of `width` channels."""
    means, turned = letters.meaning(factor)
    plain = factor.args[0] if turned else factor
    if isinstance(means, Rotation):
        made = torch.block_diag(*[means.matrix()] * (width // means.block))
    elif isinstance(means, Pick):
        made = torch.eye(means.width, dtype=torch.float64)[:, means.start : means.end]
    elif str(plain).startswith("C"):
        made = torch.eye(width, dtype=torch.float64) - 1 / width
    else:
        made = drawn(str(plain), width, width)
    return made.t() if turned else made


def value(e: sympy.Expr) -> Any:
    """A value's rows [6, channels] in numbers."""
    if e.is_Add:
        return sum(value(term) for term in e.args)
    number, rest = e.as_coeff_Mul()
    if rest == 1 or number == 0:
        return float(number)
    first, *factors = rest.args if rest.is_Mul else (rest,)
    if first.is_Pow:
        raise AssertionError("a row times a row")
    if isinstance(first, AppliedUndef):
        x = value(first.args[0])
        name = first.func.__name__
        made = x.flip(0) if name == "flip" else x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
        made = x.reshape(-1, int(name[-2])) if name.startswith("view") and "*" not in name else made
    else:
        made = drawn(str(first), 6, 8)
    for factor in factors:
        for _ in range(int(factor.exp) if factor.is_Pow else 1):
            made = made @ matrix(factor.base if factor.is_Pow else factor, made.shape[-1])
    return float(number) * made


@given(st.lists(st.integers(0, 12), max_size=9), st.lists(st.integers(0, 12), max_size=5))
def test_a_normal_form_is_the_same_value(first: list[int], second: list[int]) -> None:
    def word(choices: list[int]) -> sympy.Expr:
        made, width = ROW, 8
        for c in choices:
            if c == 9:
                made = function("flip", [made], Meaning(ROWS, (0,), True, True))
            elif c == 10:
                made = function("rms", [made], Meaning(NORM, (0,)))
            elif c in (11, 12):
                cut = letters.pick(8, 4 * (c - 11), 4 * (c - 11) + 4)
                made, width = made * (cut if width == 8 else sympy.transpose(cut)), 12 - width
            else:
                from_ = WIDE if width == 8 else NARROW
                turn = from_[c % len(from_)]
                made = made * (sympy.transpose(turn) if c > 4 else turn)
        return made if width == 8 else made * sympy.transpose(letters.pick(8, 0, 4))

    written = word(first) - 2 * word(second)
    normal = Normal(ALL)
    found = normal(written)
    expected, actual = value(written), value(found)
    torch.testing.assert_close(
        torch.as_tensor(actual) * torch.ones(6, 8).double(), expected * torch.ones(6, 8).double()
    )
    assert normal(found) == found, "twice is once"


def test_views_that_undo_each_other_vanish() -> None:
    there = view(ROW * letters.hadamard(4), ("3", "8"), ("3", "2", "4"))
    back = view(there * letters.hadamard(4), ("3", "2", "4"), ("3", "8"))
    assert Normal(ALL)(back - ROW) == 0
    assert Normal(frozenset())(back - ROW) != 0, "no axiom, no proof"
    assert show(there) == "view[3,8→3,2,4](x1·H4)"


def test_a_block_that_a_view_cuts_is_not_carried() -> None:
    flat = view(ROW, ("3", "8"), ("3", "4", "2"))
    assert Normal(ALL)(flat * letters.hadamard(4) - view(ROW * letters.hadamard(4), ("3", "8"), ("3", "4", "2"))) != 0


def test_only_a_vector_is_all_of_its_rows() -> None:
    """A table of positions added to a value is another in each row; a bias is not."""
    vector, table = letters.letter("w1", meaning="vector"), letters.letter("W1")
    picked = lambda x: function("select[1,0]", [x], Meaning(ROWS, (0,), True, True))
    assert Normal(ALL)(picked(vector * table) - vector * table) == 0
    assert Normal(ALL)(picked(table) - table) != 0
    assert Normal(ALL)(picked(ROW) - ROW) != 0


def test_heads_that_a_slice_drops_vanish() -> None:
    """x [3, 8] as two heads of 4 channels, of which one is taken, in which R is."""
    (first, second), turn = (letters.pick(8, i, i + 4) for i in (0, 4)), letters.hadamard(4)
    joint = ROW * first * turn * sympy.transpose(first) + ROW * second * sympy.transpose(second)
    cut = lambda x: view(x, ("3", "8"), ("3", "2", "4"))
    taken = lambda x, i: function(
        f"select[1,{i}]", [x], Meaning(ROWS, (0,), True, True, moves=lambda t: t.select(1, i))
    )
    claims = {i: taken(cut(ROW), i) - taken(cut(joint), i) * turn for i in (0, 1)}
    assert Normal(ALL, heads=True)(claims[0]) == 0 and Normal(ALL)(claims[0]) != 0
    assert Normal(ALL, heads=True)(claims[1]) != 0, "the other head is not rotated"
    assert Normal(ALL - {HEADS}, heads=True)(claims[0]) != 0, "no axiom, no proof"


def test_a_matrix_cancels_where_it_is_orthogonal() -> None:
    for off, cancels in ((0.0, True), (1e-9, False)):
        bent = Rotation(2, lambda off=off: torch.eye(2, dtype=torch.float64) + off)
        made = letters.letter(f"Q2/{off}", meaning=bent)
        assert (Normal(ALL)(ROW * made * sympy.transpose(made) - ROW) == 0) is cancels


@dataclass(frozen=True)
class Together(Pass):
    """linear(x, V) + linear(x, W) as linear(x, V + W), or as something else."""

    name: ClassVar[str] = "together"
    algebra: ClassVar[Algebra | None] = Algebra(frozenset())
    broken: str = ""

    def run(self, program: Program, rewriter: Rewriter) -> None:
        (node,) = [n for n in program.graph.nodes if n.target is aten.add.Tensor]
        first, second = node.args
        x, v = first.args
        weights: list[Expression] = [v.meta["weight"], second.args[1].meta["weight"]]

        def build(new: Any) -> Any:
            total = new.weight(Add(*(weights if self.broken != "twice" else weights[:1] * 2)))
            return new(aten.linear.default, x, total)

        if self.broken == "besides":
            after = next(n for n in program.graph.nodes if n.target is aten.tanh.default)
            build_sum = build

            def build(new: Any) -> Any:
                after.replace_all_uses_with(after.args[0])
                return build_sum(new)

        rewriter.rewrite(node, [node], build, "together")


class Sum(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = (torch.nn.Linear(4, 4, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.v(x) + self.w(x))


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        ("", "proved"),
        ("twice", "not proved"),
        ("besides", "not translated: output was changed as well, and is not among what is replaced"),
    ],
)
def test_a_pass_of_ones_own(broken: str, status: str) -> None:
    program = fuseline.capture(Sum(), (torch.randn(3, 4),))
    _, proof = fuseline.prove(program, fuseline.Pipeline([Together(broken=broken)]))
    (statement,) = proof.statements
    assert statement.status == status and proof.is_complete == (not broken)
    if broken != "besides":
        assert statement.text == f"x1·W1ᵀ + x1·W2ᵀ = {'2·x1·W1ᵀ' if broken else 'x1·(W1ᵀ + W2ᵀ)'}"
