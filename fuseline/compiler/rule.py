"""Rule: a pattern, guards that answer with a reason when they refuse, and a builder."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from .pattern import Match, Scalar, Term, Var, find, root_ops

if TYPE_CHECKING:
    from .program import Program
    from .rewriter import Builder


@dataclass
class Searched:
    """What rules looked for, and at how many nodes: those whose op is a pattern's outermost one."""

    terms: list[Term] = field(default_factory=list)
    nodes: int = 0


_searched: ContextVar[Searched | None] = ContextVar("searched", default=None)


@contextlib.contextmanager
def searching() -> Iterator[Searched]:
    """The searches of the rules that are applied inside the block, whatever way they come by their patterns."""
    searched = Searched()
    token = _searched.set(searched)
    try:
        yield searched
    finally:
        _searched.reset(token)


class Rule:
    """A rewrite of one shape.

        class DoubleNegation(Rule):
            def before(self, x):
                return -(-x)

            def after(self, m, new):
                return m.x

    The parameters of `before` are the pattern's variables; annotate one with `Scalar` to match Python numbers only.
    Rules whose sites are not trees (several roots, proofs over subgraphs) override `matches` instead.

    settles: whether a rewrite takes back what a rule before had refused at the site; where it refuses, too, both
    reasons are kept.
    """

    settles = False

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
        searched = _searched.get() or Searched()
        searched.terms.append(term)
        ops = root_ops(term)
        for node in list(program.graph.nodes):
            if node.op == "call_function" and getattr(node.target, "_opname", "") in ops and not node._erased:
                searched.nodes += 1
                found = find(term, node)
                if found is not None:
                    yield found
