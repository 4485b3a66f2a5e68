"""Fuzz of the mask prover: whatever it claims must be the mask, element for element, at concrete sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch.fx.experimental.proxy_tensor import make_fx

from fuseline.compiler.capture import capture
from fuseline.compiler.observe.numerics import error
from fuseline.compiler.ops.attention import visibility
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from tests.passes.families import attentions

Build = Callable[[Any, Any, torch.Tensor], torch.Tensor]  # S, T, padding [B, T] → mask that broadcasts to [B, 1, S, T]

BATCH, SIZE = 2, 4
FUZZ: dict[str, Any] = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}


class Masked(torch.nn.Module):
    def __init__(self, build: Build):
        super().__init__()
        self.build = build

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.build(q.shape[2], k.shape[2], padding))


# Spellings


def positions(spelling: int, size: Any, dim: int) -> torch.Tensor:
    """0 … size − 1 along dimension 2 (queries) or 3 (keys) of a 4-d tensor."""
    line = [
        lambda: torch.arange(size),
        lambda: torch.arange(1, size + 1) - 1,
        lambda: torch.ones(size, dtype=torch.long).cumsum(0) - 1,
        lambda: torch.arange(size).unsqueeze(0).expand(3, -1)[1],
        lambda: torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1, size)]),
    ][spelling]()
    return line[None, None, :, None] if dim == 2 else line.unsqueeze(0).unsqueeze(0).unsqueeze(0)


COMPARISONS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda a, b: a <= b,
    lambda a, b: a < b,
    lambda a, b: b >= a,
    lambda a, b: (b - a) > 0,
    lambda a, b: ~(a > b),
    lambda a, b: torch.logical_not(torch.lt(b, a)),
    lambda a, b: a == b,
    lambda a, b: a != b,
]

CONJUNCTIONS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda a, b: a & b,
    torch.logical_and,
    lambda a, b: a * b,
    lambda a, b: ~(~a | ~b),
    lambda a, b: torch.where(a, b, False),
    lambda a, b: a.masked_fill(~b, False),
]


@st.composite
def comparison(draw: st.DrawFn) -> Build:
    """k against q + c, either way round."""
    one, other, shift = draw(st.integers(0, 4)), draw(st.integers(0, 4)), draw(st.integers(-3, 3))
    compare, swapped = draw(st.sampled_from(COMPARISONS)), draw(st.booleans())

    def build(s: Any, t: Any, padding: torch.Tensor) -> torch.Tensor:
        q, k = positions(one, s, 2) + shift, positions(other, t, 3)
        return compare(q, k) if swapped else compare(k, q)

    return build


@st.composite
def triangle(draw: st.DrawFn) -> Build:
    diagonal, lower, inverted = draw(st.integers(-3, 3)), draw(st.booleans()), draw(st.booleans())

    def build(s: Any, t: Any, padding: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(s, t, dtype=torch.bool)
        part = torch.tril(ones, diagonal) if lower else torch.triu(ones, diagonal)
        return (~part if inverted else part)[None, None]

    return build


@st.composite
def keys(draw: st.DrawFn) -> Build:
    """The caller's padding in some spelling, also reversed or shifted."""
    kind = draw(st.integers(0, 7))

    def build(s: Any, t: Any, padding: torch.Tensor) -> torch.Tensor:
        batch = torch.arange(padding.shape[0])[:, None, None, None]
        return [
            lambda: padding[:, None, None, :],
            lambda: padding.view(padding.shape[0], 1, 1, t),
            lambda: padding[batch, positions(0, t, 3)],
            lambda: ~(~padding)[:, None, None, :],
            lambda: padding.flip(-1)[:, None, None, :],
            lambda: padding[batch, t - 1 - positions(0, t, 3)],
            lambda: torch.cat([padding[:, 1:], padding[:, :1]], 1)[:, None, None, :],
            lambda: padding.long()[:, None, None, :] == 1,
        ][kind]()

    return build


def combined(children: st.SearchStrategy[Build]) -> st.SearchStrategy[Build]:
    @st.composite
    def build(draw: st.DrawFn) -> Build:
        a, b = draw(children), draw(children)
        conjunction = draw(st.sampled_from([*CONJUNCTIONS, *CONJUNCTIONS, lambda x, y: x | y, lambda x, y: x ^ y]))
        return lambda s, t, padding: conjunction(a(s, t, padding), b(s, t, padding))

    return build()


predicates = st.recursive(st.one_of(comparison(), triangle(), keys()), combined, max_leaves=4)


@st.composite
def usual(draw: st.DrawFn) -> Build:
    """What models build: causal, perhaps with a window, perhaps padded; in any spelling, perhaps off by one."""
    one, other = draw(st.integers(0, 4)), draw(st.integers(0, 4))
    shift, window = draw(st.sampled_from([0, 0, 0, 1, -1, 2])), draw(st.sampled_from([None, 1, 2, 3]))
    upper, lower = draw(st.sampled_from(COMPARISONS[:6])), draw(st.sampled_from(COMPARISONS[:6]))
    joined, padded = draw(st.sampled_from(CONJUNCTIONS)), draw(st.one_of(st.none(), keys()))

    def build(s: Any, t: Any, padding: torch.Tensor) -> torch.Tensor:
        q, k = positions(one, s, 2) + shift, positions(other, t, 3)
        mask = upper(k, q)
        if window is not None:
            mask = joined(mask, lower(q, k + window))
        return mask if padded is None else joined(padded(s, t, padding), mask)

    return build


@st.composite
def masks(draw: st.DrawFn) -> Build:
    """A boolean mask, or an additive one."""
    predicate = draw(st.one_of(usual(), predicates))
    form = draw(st.sampled_from([0, 0, 1, 2, 3, 4, 5]))
    low = torch.finfo(torch.float64).min

    def build(s: Any, t: Any, padding: torch.Tensor) -> torch.Tensor:
        visible = predicate(s, t, padding)
        return [
            lambda: visible,
            lambda: visible.expand(padding.shape[0], -1, -1, -1),
            lambda: torch.where(visible, 0.0, torch.finfo(torch.float32).min).double(),
            lambda: torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf")),
            lambda: (1.0 - visible.double()) * low,
            lambda: torch.where(visible, 0.0, -2.0).double(),
        ][form]()

    return build


# The property


def inputs(s: int, t: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(10 * s + t)
    q, k, v = (torch.randn(BATCH, 1, n, SIZE, dtype=torch.float64, generator=generator) for n in (s, t, t))
    return q, k, v, torch.rand(BATCH, t, generator=generator) < 0.6


def check(program: Program, build: Build, sizes: list[tuple[int, int]]) -> str | None:
    """The raised program computes what the captured one does; its claim is the mask. Returns the claimed kind."""
    raised, _ = Pipeline("raise").run(program, verification="full")
    (node,) = attentions(raised)
    claimed = "fuseline_mask" not in node.meta["custom"]
    module = raised.to_module()
    for s, t in sizes:
        arguments = inputs(s, t)
        expected = Masked(build)(*arguments)
        assert error(first(module(*arguments)), expected) < 1e-12
        if claimed:
            assert_visible(raised, node, build, arguments)
    return str(node.args[5]) if claimed else None


def first(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs


class _Watch(torch.fx.Interpreter):
    """Keeps the arguments that the attention is called with."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.fuseline.attention.default:
            self.seen = args
        return super().call_function(target, args, kwargs)


def assert_visible(program: Program, node: torch.fx.Node, build: Build, arguments: tuple[torch.Tensor, ...]) -> None:
    q, k, _, padding = arguments
    module, expressions = program.lift()
    watch = _Watch(module)
    watch.run(
        *[arguments[i - program.arguments[0]] for i in program.arguments], *program.binder(expressions)(arguments)
    )
    _, _, _, mask, _, kind, offset, window = watch.seen[:8]
    claim = visibility(q, k, mask, kind, offset, window)
    written = build(q.shape[2], k.shape[2], padding)
    if written.dtype != torch.bool:
        written = written == 0
    full = (BATCH, 1, q.shape[2], k.shape[2])
    seen = torch.ones(full, dtype=torch.bool) if claim is None else claim.expand(full)
    assert torch.equal(seen, written.expand(full))


@pytest.mark.slow
@settings(max_examples=150, **FUZZ)
@given(build=masks(), sizes=st.sampled_from([(5, 5), (4, 4), (3, 6), (1, 5), (6, 2), (1, 1)]))
def test_claims_are_the_mask(build: Build, sizes: tuple[int, int]) -> None:
    s, t = sizes
    arguments = inputs(s, t)
    module = make_fx(Masked(build), pre_dispatch=True)(*arguments)
    check(Program.from_fx(module, arguments), build, [(s, t)])


def check_all_sizes(build: Build) -> None:
    length = torch.export.Dim.AUTO
    dynamic = {"q": {2: length}, "k": {2: length}, "v": {2: length}, "padding": {1: length}}
    try:
        program = capture(Masked(build), inputs(5, 7), dynamic=dynamic)
    except Exception as error:  # a spelling that only fits S = T, or that export cannot follow
        assert type(error).__name__ == "CaptureError"
        return
    free = [
        isinstance(n.meta["val"].shape[-2 if i < 3 else -1], torch.SymInt) for i, n in enumerate(program.placeholders)
    ]
    if all(free):
        check(program, build, [(5, 7), (2, 9), (9, 3)])


@settings(max_examples=6, **FUZZ)
@given(build=masks())
def test_claims_hold_for_all_sizes(build: Build) -> None:
    check_all_sizes(build)


@pytest.mark.slow
@settings(max_examples=15, **FUZZ)
@given(build=masks())
def test_more_claims_hold_for_all_sizes(build: Build) -> None:
    check_all_sizes(build)
