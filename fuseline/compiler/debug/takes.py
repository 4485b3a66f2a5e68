"""Which sites each pass of a pipeline takes and which it refuses, with the user's lines; no pass stops the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .. import registry
from ..action import Action, Observer
from ..errors import EmptyPassError, FuselineError
from ..framework import Level, Pass, Tier
from ..pipeline import DEFAULT, Pipeline, needs_calibration
from ..program import Program
from ..provenance import is_ours, source_line, source_lines
from ..report import PassReport, Report
from ..sites import sites


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
    failure: str | None = None
    remedy: str | None = None


class _Watch(Observer):
    def __init__(self) -> None:
        self.taken: list[Taken] = []
        self.report: PassReport | None = None

    def rewritten(self, action: Action, program: Program) -> None:
        lines = tuple(line for line in source_lines(action.removed) if not is_ours(line))
        self.taken.append(Taken(action.rule, action.site, lines))

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
        error = needs_calibration(Pipeline([step]))
        result.failure, result.remedy = error.headline, error.remedy
        return program, result
    lines = {site: source_line(node) for node, site in sites(program.graph).items()}
    lines = {site: line for site, line in lines.items() if line is not None and not is_ours(line)}
    watch = _Watch()
    try:
        after, _ = Pipeline([replace(step, allow_empty=True)]).run(program, [watch])
    except FuselineError as error:
        result.failure, result.remedy = "; ".join([error.headline, *error.details]), error.remedy
        return program, result
    report = watch.report
    assert report is not None
    result.nodes_after, result.ms, result.taken = report.nodes_after, report.ms, watch.taken
    result.refused = [Refused(site, reason, lines.get(site)) for site, reason in report.refused.items()]
    if not result.taken:
        nothing = EmptyPassError("found no site", step.nothing_matched(program), step.remedy(program))
        result.failure, result.remedy = "; ".join([nothing.headline, *nothing.details]), nothing.remedy
    return after, result


def exact_passes() -> tuple[Pass, ...]:
    """Every registered exact pass that works before autograd, at its example's options, in an order that runs.

    The default pipeline's last pass groups what the others leave, so the others come before it.
    """
    first, last = Pipeline(DEFAULT).passes[:-1], Pipeline(DEFAULT).passes[-1]
    known = {step.name for step in (*first, last)}
    others = [
        Pipeline(kind.example or name).passes[-1]
        for name, kind in registry.available().items()
        if kind.tier is Tier.EXACT and kind.level is Level.NORMAL and name not in known
    ]
    return (*first, *others, last)
