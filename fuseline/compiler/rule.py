"""Rule: a pattern, guards that answer with a reason when they refuse, and a builder."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from .pattern import Match, Scalar, Term, Var, find, root_ops

if TYPE_CHECKING:
    from .program import Program
    from .rewriter import Builder


_tried: ContextVar[list[Term] | None] = ContextVar("tried", default=None)


@contextlib.contextmanager
def terms_tried() -> Iterator[list[Term]]:
    """The patterns that rules look for inside the block, whatever way they come by them."""
    terms: list[Term] = []
    token = _tried.set(terms)
    try:
        yield terms
    finally:
        _tried.reset(token)


class Rule:
    """A rewrite of one shape.

        class DoubleNegation(Rule):
            def before(self, x):
                return -(-x)

            def after(self, m, new):
                return m.x

    The parameters of `before` are the pattern's variables; annotate one with `Scalar` to match Python numbers only.
    Rules whose sites are not trees (several roots, proofs over subgraphs) override `matches` instead.
    """

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def inner(self) -> Rule:
        """The rule itself; one that wraps another, to refuse more, names that one: its file is what explains it."""
        return self

    def before(self, *variables: Any) -> Term:
        raise NotImplementedError

    def refuse(self, m: Match) -> str | None:
        """Why this match must be left alone, for a person to read; None to go ahead."""
        return None

    def after(self, m: Match, new: Builder) -> Node | dict[Node, Node]:
        """Builds what replaces the root (or a mapping from old nodes to new ones)."""
        raise NotImplementedError

    def pattern(self) -> Term:
        """`before`, run on variables named after its parameters."""
        variables = []
        for name, parameter in inspect.signature(self.before).parameters.items():
            scalar = parameter.annotation in (Scalar, "Scalar")
            variables.append(Scalar(name) if scalar else Var(name))
        return self.before(*variables)

    def matches(self, program: Program) -> Iterator[Match]:
        """All places where the pattern fits, in graph order; nodes replaced meanwhile are skipped."""
        yield from self.find_all(program, self.pattern())

    @staticmethod
    def find_all(program: Program, term: Term) -> Iterator[Match]:
        """All places where one pattern fits, for rules that have several."""
        tried = _tried.get()
        if tried is not None:
            tried.append(term)
        ops = root_ops(term)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and getattr(node.target, "_opname", "") in ops and not node._erased:
                found = find(term, node)
                if found is not None:
                    yield found
