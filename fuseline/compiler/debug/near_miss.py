"""Why a rule does or does not match at a place: `explain(program, rule, site)`.

The rule is asked first, through a rewriter whose rewrites are all forbidden: what it takes there and what it refuses,
in its own words. Where it takes nothing, the patterns that it looked for are held against the place leniently
(`closest.py`), and the constraint that fails is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..action import Action, Observer
from ..pattern import Match, Term
from ..program import Program
from ..provenance import module_path, source_line
from ..rewriter import Builder, Rewriter
from ..rule import Rule, searching
from .closest import NearMiss, call_text, closest, depth
from .where import Where, locate

LIKE = 0.6  # a near miss has this much of its pattern


@dataclass(frozen=True)
class Fit:
    """A match that a rule found. refusal: why it leaves it alone, in its own words; nodes: as text, in graph order."""

    rule: str
    root: str
    site: str
    module: str
    line: str | None
    refusal: str | None
    nodes: tuple[str, ...]


@dataclass
class Explanation:
    """What a rule makes of a place, or of a whole program.

    location: `file:line` of the rule; fits: matches there, refused ones too; misses: the closest candidates that no
    match covers, the likeliest first; notes: what else there is to say.
    """

    rule: str
    location: str | None
    place: str | None
    fits: list[Fit] = field(default_factory=list)
    misses: list[NearMiss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ "matches", "refused" or "no match"."""
        if any(fit.refusal is None for fit in self.fits):
            return "matches"
        return "refused" if self.fits else "no match"

    def to_json(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "location": self.location,
            "place": self.place,
            "verdict": self.verdict,
            "fits": [vars(fit) for fit in self.fits],
            "misses": [miss.to_json() for miss in self.misses],
            "notes": self.notes,
        }


def explain(
    program: Program, rule: Rule, site: str | Where | None = None, site_of: Mapping[Node, str] | None = None
) -> Explanation:
    """What a rule makes of a site of a program; of all of it without one. The program stays as it is.

    Args:
        rule: made for this program, where it looks at it beforehand.
        site: `model.layers.3.mlp/linear#2`, a module path, a node's name or `file.py:174`.
        site_of: the sites' names, where they are those of the program before some rewrites.

    Raises:
        UserError: no such site.
    """
    where = locate(program, site) if isinstance(site, str) else site
    found = Explanation(rule.name, place_of(rule), None if where is None else where.text)
    matches, terms, refused = _asked(program, rule, site_of)
    wanted = None if where is None else set(where.nodes)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    covered: set[Node] = set()
    for match, site_name in matches:
        inside = {match.root, *match.nodes}
        covered |= inside
        if wanted is None or inside & wanted:
            nodes = tuple(call_text(n) for n in sorted(inside, key=lambda n: order.get(n, 0)))
            at = match.root.name, site_name, module_path(match.root), source_line(match.root)
            found.fits.append(Fit(rule.name, *at, refused.get(match.root), nodes))
    if where is None or where.whole or not found.fits:
        found.misses, passed = _misses(program, terms, where, covered)
        if passed and not found.fits:
            found.notes.append(
                f"the pattern fits at {', '.join(n.name for n in passed[:3])}, but the rule passes over it: a check of "
                f"its own, in {place_of(rule, 'matches')}"
            )
    if not terms and not found.fits:
        by = place_of(rule, "matches")
        found.notes.append(f"the rule has no pattern to compare with: it looks for its sites by itself, in {by}")
    return found


def place_of(rule: Rule, method: str | None = None) -> str | None:
    """`file:line` of a rule, or of one of its methods."""
    kind = type(rule.inner)
    return code_place(kind if method is None else getattr(kind, method))


def code_place(code: Any) -> str | None:
    """`file:line` of a class or a function, where its source can be found."""
    try:
        return f"{inspect.getsourcefile(code)}:{inspect.getsourcelines(code)[1]}"
    except (OSError, TypeError):
        return None


class _Forbids(Observer):
    """Every rewrite is skipped."""

    def allows(self, action: Action) -> bool:
        return False


class _Noted(Rule):
    """A rule that keeps its matches, and what it said of them."""

    def __init__(self, rule: Rule):
        self.rule = rule
        self.found: list[Match] = []
        self.reasons: dict[Node, str] = {}

    @property
    def name(self) -> str:
        return self.rule.name

    def matches(self, program: Program) -> Iterator[Match]:
        for match in self.rule.matches(program):
            self.found.append(match)
            yield match

    def refuse(self, m: Match) -> str | None:
        reason = self.rule.refuse(m)
        if reason is not None:
            self.reasons[m.root] = reason
        return reason

    def after(self, m: Match, new: Builder) -> Node | dict[Node, Node]:
        return self.rule.after(m, new)


def _asked(
    program: Program, rule: Rule, site_of: Mapping[Node, str] | None
) -> tuple[list[tuple[Match, str]], list[Term], dict[Node, str]]:
    """The rule's matches with their sites, the patterns that it looked for, and what was refused, by root."""
    noted, rewriter = _Noted(rule), Rewriter(program, rule.name, [_Forbids()])
    rewriter.site_of = {**rewriter.site_of, **(site_of or {})}
    with searching() as searched:
        rewriter.apply_all([noted])
    sites = {m.root: rewriter.site_of.get(m.root, m.root.name) for m in noted.found}
    # The rewriter refuses on its own, too, and knows sites.
    refused = {root: rewriter.refused[site] for root, site in sites.items() if site in rewriter.refused}
    return [(m, sites[m.root]) for m in noted.found], searched.terms, {**refused, **noted.reasons}


def _misses(
    program: Program, terms: Sequence[Term], where: Where | None, covered: set[Node]
) -> tuple[list[NearMiss], list[Node]]:
    """The near misses of a place, and where a pattern fits without the rule taking it."""
    candidates: list[NearMiss] = []
    for term in terms:
        for root in _roots(program, where, depth(term)):
            if root not in covered:
                miss = closest(term, root, thorough=where is not None)
                if miss is not None and not covered & {*miss.nodes}:
                    candidates.append(miss)
    if where is not None:
        wanted = set(where.nodes)
        candidates = [m for m in candidates if wanted & {m.root, *m.nodes, *m.at}]
    passed = [m.root for m in candidates if not m.problems]
    chosen = _best_first(m for m in candidates if m.problems)
    like = [m for m in chosen if m.share >= LIKE]
    return (like if like or where is None else chosen[:1]), passed


def _roots(program: Program, where: Where | None, reach: int) -> Iterable[Node]:
    """Nodes at which a pattern of some depth may have its root, if it takes in one of the place."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    if where is None:
        return calls
    near, front = set(where.nodes), set(where.nodes)
    for _ in range(reach):
        front = {user for node in front for user in node.users} - near
        near |= front
    return [n for n in calls if n in near]


def _best_first(misses: Iterable[NearMiss]) -> list[NearMiss]:
    """The likeliest first; of those that share nodes, one."""
    chosen: list[NearMiss] = []
    taken: set[Node] = set()
    for miss in sorted(misses, key=lambda m: (-m.share, len(m.problems), -m.parts)):
        inside = {miss.root, *miss.nodes}
        if not inside & taken:
            taken |= inside
            chosen.append(miss)
    return chosen
