"""The decision procedure behind the mask proofs, against brute force."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import sympy
import torch
from hypothesis import given, settings
from torch.fx.experimental.proxy_tensor import make_fx

from fuseline.compiler.index_algebra import AtLeast, Formula, Linear, Size, both, either, equal, negate
from fuseline.compiler.index_proof import Prover, contradictory
from fuseline.compiler.index_reader import Reader
from fuseline.compiler.program import Program
from fuseline.passes.raising.mask_arguments import MaskArguments
from fuseline.passes.raising.masks import Claim

EXTENT = 4
NAMES = ("x", "y", "z")


def prover() -> tuple[Prover, list[Linear]]:
    proofs = Prover()
    return proofs, [proofs.variable(name, EXTENT) for name in NAMES]


@st.composite
def inequality(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    return tuple(draw(st.integers(-2, 2)) for _ in NAMES), draw(st.integers(-6, 6))


formulas = st.recursive(
    inequality(),
    lambda inner: st.one_of(
        st.tuples(st.just("and"), inner, inner),
        st.tuples(st.just("or"), inner, inner),
        st.tuples(st.just("not"), inner),
    ),
    max_leaves=5,
)


def built(tree: tuple, variables: list[Linear]) -> Formula:
    match tree:
        case ("and", a, b):
            return both(built(a, variables), built(b, variables))
        case ("or", a, b):
            return either(built(a, variables), built(b, variables))
        case ("not", a):
            return negate(built(a, variables))
        case (factors, constant):
            return both(AtLeast(sum((v * f for v, f in zip(variables, factors)), Linear(constant=constant))))


def holds(tree: tuple, point: tuple[int, ...]) -> bool:
    match tree:
        case ("and", a, b):
            return holds(a, point) and holds(b, point)
        case ("or", a, b):
            return holds(a, point) or holds(b, point)
        case ("not", a):
            return not holds(a, point)
        case (factors, constant):
            return sum(f * p for f, p in zip(factors, point)) + constant >= 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(claim=formulas, premise=formulas)
def test_what_is_proved_is_true(claim: tuple, premise: tuple) -> None:
    proofs, variables = prover()
    points = list(itertools.product(range(EXTENT), repeat=len(NAMES)))
    if proofs.proves(built(claim, variables), given=built(premise, variables)):
        assert all(holds(claim, p) for p in points if holds(premise, p))
    simple = proofs.simplify(built(claim, variables))
    assert proofs.equivalent(simple, built(claim, variables)) or simple == built(claim, variables)


def test_it_proves_what_masks_need() -> None:
    proofs, (x, y, _) = prover()
    assert proofs.proves(AtLeast(x - y), given=both(AtLeast(x - y - 1)))
    assert not proofs.proves(AtLeast(x - y - 1), given=both(AtLeast(x - y)))
    assert proofs.proves(equal(x, y), given=both(AtLeast(x - y), AtLeast(y - x)))
    assert proofs.proves(AtLeast(Linear(constant=EXTENT - 1) - x))
    # 2x = 2y + 1 has rational solutions and no integer ones.
    assert contradictory([x * 2 - y * 2 - 1, y * 2 - x * 2 + 1])


def test_a_size_that_the_graph_does_not_compute_cannot_be_an_argument() -> None:
    program = Program.from_fx(make_fx(torch.sin)(torch.ones(3)), [torch.ones(3)])
    built_arguments = MaskArguments(Reader(program))
    last = program.graph.output_node()
    assert built_arguments.can_build(Claim("causal", Linear(constant=2)), last)
    assert not built_arguments.can_build(Claim("causal", Linear.of(Size(sympy.Symbol("u0")))), last)
