"""What a pass makes of a place: its rules one after the other, each on the graph that those before it left.

A pass with a `run` of its own is run, and what it rewrote and refused there is told in its words.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from .. import registry
from ..action import Action, Observer
from ..errors import UserError, nearest
from ..framework import Pass
from ..pipeline import Pipeline, needs_calibration
from ..program import Program
from ..provenance import module_path, source_line
from ..report import PassReport
from ..rewriter import Rewriter
from ..sites import sites
from .closest import call_text
from .near_miss import Explanation, Fit, code_place, explain
from .where import Where, locate


def parse(text: str, program: Program) -> tuple[Pass, str | None]:
    """A pass, with options or at its example's, and the rule of it that is meant: `raise/RMSNorm`, `raise`, `RMSNorm`.

    Raises:
        UserError: no such pass or rule, with the nearest.
    """
    head, slash, tail = text.rpartition("/")
    if slash and "}" not in tail:
        return _pass(head), tail
    known = registry.available()
    if text not in known and "{" not in text:
        for name in known:
            step = _pass(name)
            if _has_rules(step) and text.lower() in (rule.name.lower() for rule in step.rules(program)):
                return step, text
    return _pass(text), None


def _pass(text: str) -> Pass:
    known = registry.available()
    steps = Pipeline(known[text].example or text).passes[-1:] if text in known else Pipeline(text).passes
    if len(steps) != 1:
        raise UserError(f"'{text}' is not one pass", remedy="fuseline why raise/RMSNorm SITE MODEL")
    return steps[0]


def why(program: Program, step: Pass, rule: str | None = None, site: str | None = None) -> list[Explanation]:
    """One explanation for each rule of that name, or for each rule of the pass. The program stays as it is.

    Raises:
        UserError: no such rule or site; or the pass needs data to decide.
    """
    if not _has_rules(step):
        return [_of_own(program, step, rule, site)]
    program = program.copy()
    where = locate(program, site) if site is not None else None
    rules = list(step.rules(program))
    names = {r.name.lower(): r.name for r in rules}
    if rule is not None and rule.lower() not in names:
        raise UserError(f"pass '{step.name}' has no rule '{rule}'{nearest(rule, names.values())}")
    wanted = [r for r in rules if rule is None or r.name.lower() == rule.lower()]
    log = _Log()
    rewriter = Rewriter(program, step.name, [log])
    found = []
    for one in rules[: max(map(rules.index, wanted)) + 1]:
        if one in wanted:
            here = None if where is None else _followed(where, program, log)
            explanation = explain(program, one, here, rewriter.site_of)
            if here is not None and not explanation.fits:
                explanation.notes += log.at(where.nodes if where is not None else ())
            found.append(explanation)
        if one is not wanted[-1]:
            rewriter.apply_all([one])
    return found


def _has_rules(step: Pass) -> bool:
    return type(step).run is Pass.run


class _Log(Observer):
    """The rewrites so far: which took a node, and what stands for it now."""

    def __init__(self) -> None:
        self.taken: dict[Node, Action] = {}
        self.stands: dict[Node, Node] = {}

    def rewritten(self, action: Action, program: Program) -> None:
        for node in (*action.removed, action.root):
            self.taken.setdefault(node, action)
        self.stands.update(action.replaced)

    def at(self, nodes: Iterable[Node]) -> list[str]:
        """What became of nodes, rewrite by rewrite."""
        actions = dict.fromkeys(str(self.taken[n]) for n in nodes if n in self.taken)
        return [f"before this rule, the pass rewrote what stood there: {text}" for text in list(actions)[:3]]


def _followed(where: Where, program: Program, log: _Log) -> Where:
    """A place as the rewrites so far left it: what took a node's place stands for it."""
    nodes = []
    for node in where.nodes:
        while node in log.stands:
            node = log.stands[node]
        nodes.append(node)
    return Where(where.text, where.kind, tuple(dict.fromkeys(nodes))).now(program)


class _Record(Observer):
    """What a pass with a `run` of its own did, by the names that nodes had before it."""

    def __init__(self) -> None:
        self.fits: list[tuple[Fit, frozenset[str]]] = []
        self.report: PassReport | None = None

    def allows(self, action: Action) -> bool:
        root = action.root
        nodes = tuple(call_text(n) for n in action.removed)
        at = root.name, action.site, module_path(root), source_line(root)
        inside = frozenset({root.name, *(n.name for n in action.removed)})
        self.fits.append((Fit(action.rule, *at, None, nodes), inside))
        return True

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        self.report = report


def _of_own(program: Program, step: Pass, rule: str | None, site: str | None) -> Explanation:
    where = locate(program, site) if site is not None else None
    if step.needs_data:
        raise needs_calibration(Pipeline([step]))
    record = _Record()
    Pipeline([step.relaxed()]).run(program, [record])
    report = record.report
    assert report is not None
    name = f"{step.name}/{rule}" if rule else step.name
    found = Explanation(name, code_place(type(step).run), None if where is None else where.text)
    by_site = {s: node for node, s in sites(program.graph).items()}
    names = None if where is None else {n.name for n in where.nodes}
    for fit, inside in record.fits:
        if names is None or names & inside:
            found.fits.append(fit)
    for refused, reason in report.refused.items():
        node = by_site.get(refused)
        if names is None or (node is not None and node.name in names):
            found.fits.append(_refused(refused, node, reason))
    _filter(found, rule, report)
    if not found.fits:
        found.notes.append(_unconsidered(step, where, report, [fit for fit, _ in record.fits]))
    return found


def _refused(site: str, node: Node | None, reason: str) -> Fit:
    if node is None:  # the pass made it itself
        return Fit("", site, site, "", None, reason, ())
    return Fit("", node.name, site, module_path(node), source_line(node), reason, (call_text(node),))


def _filter(found: Explanation, rule: str | None, report: PassReport) -> None:
    """Keeps one rule's rewrites, if the pass calls one so; refusals are of the pass."""
    if rule is None:
        return
    if rule.lower() not in {name.lower() for name in report.rules}:
        made = ", ".join(f"{count} {name}" for name, count in report.rules.items()) or "no rewrite"
        found.notes.append(f"no rewrite of this pass is called '{rule}' here; it made {made}")
        return
    others = [fit for fit in found.fits if fit.refusal is None and fit.rule.lower() != rule.lower()]
    found.fits = [fit for fit in found.fits if fit not in others]
    found.notes += [f"what stands there was taken by '{fit.rule}', at {fit.site}" for fit in others[:3]]


def _unconsidered(step: Pass, where: Where | None, report: PassReport, fits: Sequence[Fit]) -> str:
    text = f"'{step}' neither rewrote nor refused anything"
    if where is None:
        return text
    near = [f.site for f in fits if where.nodes and f.module == module_path(where.nodes[0])]
    near += [s for s in report.refused if where.nodes and s.startswith(f"{module_path(where.nodes[0])}/")]
    hint = f"; in the same module it looked at {', '.join(near[:3])}" if near else ""
    return f"{text} there: it never considered this site{hint}"


def best_of(explanations: Sequence[Explanation]) -> Explanation:
    """The one that says most of a place: a match, a refusal, then the nearest miss."""
    rank = {"matches": 2, "refused": 1, "no match": 0}

    def key(one: Explanation) -> tuple[int, float]:
        return rank[one.verdict], max((m.share for m in one.misses), default=0.0)

    return max(explanations, key=key)
