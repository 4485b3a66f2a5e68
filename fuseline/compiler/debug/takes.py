"""Which sites each pass of a pipeline takes and which it refuses, with the user's lines; no pass stops the next one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from ..action import Action, Observer
from ..errors import EmptyPassError, FuselineError
from ..framework import Pass
from ..pipeline import Pipeline, needs_calibration
from ..program import Program
from ..provenance import is_ours, source_line, source_lines
from ..report import PassReport, Report
from ..sites import sites
from .near_miss import explain


@dataclass(frozen=True)
class Taken:
    """A site that a rule rewrote; lines: the user's, of all nodes that went in."""

    rule: str
    site: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A site that a pass left alone; line: the user's, None where there is none."""

    site: str
    reason: str
    line: str | None


@dataclass(frozen=True)
class Near:
    """A place that a rule nearly fits, and that no rule of the pass took. line: the user's."""

    rule: str
    module: str
    line: str | None
    problem: str
    fits: int
    parts: int


@dataclass
class Takes:
    """One pass over one program.

    failure: why there is no result (the pass needs data, found nothing, or failed), and what to do about it.
    """

    name: str
    text: str
    tier: str
    nodes_before: int
    nodes_after: int
    ms: float = 0.0
    taken: list[Taken] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    near: list[Near] = field(default_factory=list)
    failure: str | None = None
    remedy: str | None = None


class _Watch(Observer):
    def __init__(self) -> None:
        self.taken: list[Taken] = []
        self.removed: set[str] = set()
        self.report: PassReport | None = None

    def rewritten(self, action: Action, program: Program) -> None:
        lines = tuple(line for line in source_lines(action.removed) if not is_ours(line))
        self.taken.append(Taken(action.rule, action.site, lines))
        self.removed |= {node.name for node in action.removed}

    def pipeline_ends(self, program: Program, report: Report) -> None:
        self.report = report.passes[0]


def takes(program: Program, steps: Sequence[Pass]) -> tuple[Program, list[Takes]]:
    """Runs each pass on what the ones before it left; one that fails leaves the program as it was.

    Returns the program behind the last pass, and what each did.
    """
    found = []
    for step in steps:
        program, one = _one(program, step)
        found.append(one)
    return program, found


def _one(program: Program, step: Pass) -> tuple[Program, Takes]:
    result = Takes(step.name, str(step), step.tier.value, len(program), len(program))
    if step.needs_data:
        result.failure = needs_calibration(Pipeline([step])).headline
        result.remedy = "fuseline run MODEL -p PIPELINE, which calibrates and reports the sites"
        return program, result
    lines = {site: source_line(node) for node, site in sites(program.graph).items()}
    lines = {site: line for site, line in lines.items() if line is not None and not is_ours(line)}
    watch = _Watch()
    try:
        after, _ = Pipeline([step.relaxed()]).run(program, [watch])
    except FuselineError as error:
        result.failure, result.remedy = "; ".join([error.headline, *error.details]), error.remedy
        return program, result
    report = watch.report
    assert report is not None
    result.nodes_after, result.ms, result.taken = report.nodes_after, report.ms, watch.taken
    result.refused = [Refused(site, reason, lines.get(site)) for site, reason in report.refused.items()]
    result.near = near_misses(program, step, watch.removed)
    if not (result.taken or step.allow_empty):
        nothing = EmptyPassError("found no site", step.nothing_matched(program), step.remedy(program))
        result.failure, result.remedy = "; ".join([nothing.headline, *nothing.details]), nothing.remedy
    return after, result


def near_misses(program: Program, step: Pass, taken: Collection[str]) -> list[Near]:
    """The places that rules of a pass nearly fit, the likeliest first, without those that have a node in `taken`.

    A place that two rules nearly fit is the better one's. Passes without patterns have none.
    """
    if type(step).run is not Pass.run:
        return []
    found: dict[str, tuple[float, Near]] = {}
    for rule in step.rules(program):
        for miss in explain(program, rule).misses:
            nodes = {node.name for node in miss.nodes}
            if nodes & set(taken) or not miss.problems:
                continue
            problem = miss.problems[0]
            line = problem.line if problem.line is not None and not is_ours(problem.line) else None
            near = Near(rule.name, problem.module, line, problem.text, miss.fits, miss.parts)
            if miss.root.name not in found or miss.share > found[miss.root.name][0]:
                found[miss.root.name] = miss.share, near
    return [near for _, near in sorted(found.values(), key=lambda entry: -entry[0])]
