r"""Pipeline: passes in the order given, from text, a TOML file or objects; and the runner, which knows no pass.

pipeline  = item ("," item)*
item      = pass | recipe                 a recipe is a name for several passes: recipes.py
pass      = name [ "{" option ("," option)* "}" ]
option    = name | name "=" value         a bare name means true; quote a value that holds , { } = or a space,
                                          and write \" for a quote in it
"""

from __future__ import annotations

import contextlib
import re
import time
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import registry
from .action import Observer, PassEnds
from .errors import EmptyPassError, FuselineError, PassError, UserError
from .expectations import check_expectations, parse_expectations
from .framework import Level, Pass, Study, Tier, build
from .observe.ambient import ambient
from .plan import Plan
from .program import JOINT, TRAINS, Program
from .recipes import recipes
from .report import PassReport, Report
from .results import Results
from .rewriter import Rewriter
from .structure import structural_hash
from .verifier import Verify

DEFAULT = "raise{allow_empty},fuse-loss{allow_empty},fuse{allow_empty}"
"""Exact passes only; a graph in which they find nothing stays as it is."""


class Pipeline:
    """A sequence of passes. `str(Pipeline(text))` is the text in its shortest form, and parses to an equal pipeline."""

    def __init__(self, passes: str | Path | Iterable[Pass] | Pipeline = DEFAULT):
        if isinstance(passes, Pipeline):
            self.passes: tuple[Pass, ...] = passes.passes
        elif isinstance(passes, Path):
            self.passes = _from_toml(passes)
        elif isinstance(passes, str):
            path = Path(passes) if passes.endswith(".toml") else None
            self.passes = _from_toml(path) if path else tuple(_parse(passes))
        else:
            self.passes = tuple(passes)
        self._check()

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def __repr__(self) -> str:
        return f"Pipeline({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pipeline) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)

    @property
    def lossy(self) -> tuple[Pass, ...]:
        """The passes that approximate."""
        return tuple(p for p in self.passes if p.tier is Tier.LOSSY)

    @property
    def joint(self) -> tuple[Pass, ...]:
        """The passes that work on forward and backward in one graph."""
        return tuple(p for p in self.passes if p.level is Level.JOINT)

    @property
    def needs_data(self) -> bool:
        """Whether some pass analyses data before it rewrites."""
        return any(p.needs_data for p in self.passes)

    def analyze(
        self,
        program: Program,
        data: Sequence[Sequence[Any]],
        checkpoint: Path | None = None,
        results: Results | None = None,
    ) -> Plan:
        """The decisions of the passes that need data, each made on the program as its predecessors left it.

        Args:
            data: flat arguments of one call each, as `program.examples`.
            checkpoint: a file that long searches write their progress to, and go on from when it is there.
            results: keeps what passes compute from contents alone (decompositions of weights) for the next analysis.
        """
        plan = Plan.empty(str(self), program)
        program, report = program.copy(), Report(str(self))
        for number, step in enumerate(self.passes, 1):
            if step.is_trained:
                raise needs_calibration(self)
            if step.needs_data:
                plan.add(step, step.decide(Study(program, data, self.passes[number:], checkpoint, results)))
            self._run_pass(step, program, [], report, plan)
        return plan

    def run(
        self,
        program: Program,
        observers: Sequence[Observer] = (),
        verification: str = "quick",
        plan: Plan | None = None,
        report: Report | None = None,
    ) -> tuple[Program, Report]:
        """Runs the passes of the program's level over a copy of it. Of a program that trains, the joint passes run
        later, on the joint graph that AOTAutograd makes of it (`joint.py`).

        Args:
            observers: watch passes and rewrites, and may skip rewrites.
            verification: "off", "quick" (structure, types, the modified flag) or "full" (fake values recomputed too).
            plan: the decisions of `analyze`, where a pass needs data.
            report: the report that is gone on with.

        Raises:
            EmptyPassError: a pass matched nothing and does not allow that.
            ExpectationError: a pass matched fewer sites than its option `expect` asks for.
            PassError, VerificationError: a pass refused the program, or broke it.
            UserError: a pass needs data and there is no plan, or it was made for something else.
        """
        joint = JOINT in program.state
        if plan is not None and not joint:
            plan.check(self, program)
        elif self.needs_data and not joint and TRAINS not in program.state:
            raise needs_calibration(self)
        watching: list[Observer] = [*observers, *ambient()]
        if verification != "off":
            watching.append(Verify(verification))
        program = program.copy()
        report = report or Report(str(self))
        for observer in watching:
            observer.pipeline_starts(self, program)
        try:
            for step in self.passes:
                if joint == (step.level is Level.JOINT) or not (joint or program.training):
                    self._run_pass(step, program, watching, report, plan)
        except Exception as error:
            for observer in watching:
                observer.stopped(error)
            raise
        program.module.recompile()
        for observer in watching:
            observer.pipeline_ends(program, report)
        return program, report

    def _run_pass(
        self, step: Pass, program: Program, observers: list[Observer], report: Report, plan: Plan | None
    ) -> None:
        if step.level is Level.JOINT and JOINT not in program.state:
            raise UserError(
                f"pass '{step.name}' works at the {step.level.value} level, on forward and backward in one graph",
                ["this program was captured before autograd"],
                'train under torch.compile(model, backend="fuseline"), or drop the pass',
            )
        missing = step.requires - program.state
        if missing:
            raise PassError(f"pass '{step.name}' needs {', '.join(sorted(missing))}", remedy=_who_ensures(missing))
        record = PassReport(step.name, str(step), step.tier.value, nodes_before=len(program))
        rewriter = Rewriter(program, step.name, observers, report.rewrites + 1)
        rewriter.decisions = plan.of(step.name) if plan is not None else {}
        before = structural_hash(program)
        for observer in observers:
            observer.pass_starts(step, program)
        started = time.perf_counter()
        try:
            with contextlib.suppress(PassEnds):
                step.run(program, rewriter)
        except Exception as error:
            for observer in observers:
                observer.failed(step, program, error)
            if isinstance(error, FuselineError):
                raise
            raise PassError(
                f"pass '{step.name}' failed: {type(error).__name__}: {error}",
                [f"after {rewriter.next_number - report.rewrites - 1} rewrites"],
            ) from error
        record.ms = (time.perf_counter() - started) * 1e3
        record.rules, record.refused = rewriter.matched, rewriter.refused
        record.matched = sum(rewriter.matched.values())
        record.nodes_after = len(program)
        report.rewrites = rewriter.next_number - 1
        changed = structural_hash(program) != before
        if changed and not record.matched:
            raise PassError(f"pass '{step.name}' changed the graph outside the rewriter")
        if not (record.matched or rewriter.skipped or rewriter.excused or step.allow_empty):
            raise _nothing_matched(step, program, record)
        if step.expect and not rewriter.skipped:
            check_expectations(step.name, step.expect, record.rules, _refusals(record))
        program.state |= step.ensures
        report.passes.append(record)
        for observer in observers:
            observer.pass_ends(step, program, record)

    def _check(self) -> None:
        joint: Pass | None = None
        for step in self.passes:
            if not isinstance(step, Pass):
                raise UserError(f"a pipeline holds Pass objects, not {type(step).__name__}: {step!r}")
            parse_expectations(step.expect)
            if step.level is Level.JOINT:
                joint = step
            elif joint is not None:
                raise UserError(
                    f"pass '{step.name}' works before autograd and cannot follow '{joint.name}', which works after it",
                    remedy=f"put '{step.name}' first",
                )


def needs_calibration(pipeline: Pipeline, model: str = "MODEL") -> UserError:
    """The error for a pipeline that was given no data, or no training; model: its name on the command line."""
    trained = [p for p in pipeline.passes if p.is_trained]
    if trained:
        return UserError(
            f"'{trained[0]}' takes what training found, and there is nothing yet",
            [f'qat = fuseline.prepare_qat(model, "{pipeline}", example), trained as any module'],
            "then fuseline.convert(qat)",
        )
    names = ", ".join(f"'{p.name}'" for p in pipeline.passes if p.needs_data)
    return UserError(
        f"{names} decides from data, and there is none",
        [f'in Python: fuseline.optimize(model, "{pipeline}", calibration=batches), or plan=PATH'],
        f'fuseline analyze {model} -p "{pipeline}" -o plan.json, then --plan plan.json',
    )


def _nothing_matched(step: Pass, program: Program, record: PassReport) -> EmptyPassError:
    details = [*step.nothing_matched(program), *_refusals(record)]
    return EmptyPassError(
        f"pass '{step.name}' matched no site",
        details or ["nothing in this program has the shape that the pass looks for"],
        step.remedy(program) or f"drop '{step.name}' from the pipeline, or allow it: {step.name}{{allow_empty}}",
    )


def _refusals(record: PassReport) -> list[str]:
    return [f"refused: {count} x {reason}" for count, reason in record.reasons()[:5]]


def _who_ensures(missing: frozenset[str]) -> str | None:
    names = [name for name, kind in registry.available().items() if kind.ensures & missing]
    return f"put '{names[0]}' before it" if names else None


def _from_toml(path: Path) -> tuple[Pass, ...]:
    """Passes from a file: `[[pass]]` tables with `name` and the options."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no pipeline file {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    found: list[Pass] = []
    listed = tables.get("pass", [])
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        raise UserError(f"'pass' in {path} is not a list of tables", remedy='[[pass]]\nname = "raise"')
    for table in listed:
        if "name" not in table:
            raise UserError(f"a [[pass]] of {path} has no name", remedy='[[pass]]\nname = "raise"')
        values = {k: _toml_text(v) for k, v in table.items() if k != "name"}
        if str(table["name"]) in recipes() and not values:
            found.extend(_parse(str(table["name"])))
        else:
            found.append(build(registry.find(str(table["name"])), values))
    if not found:
        raise UserError(f"{path} holds no [[pass]] table", remedy='[[pass]]\nname = "raise"')
    return tuple(found)


def _toml_text(value: Any) -> str | bool:
    """A TOML value as the textual pipeline would write it."""
    if isinstance(value, list):
        return "|".join(map(str, value))
    return value if isinstance(value, bool) else str(value)


def _parse(text: str) -> Iterable[Pass]:
    for item in _split(text, text):
        name, brace, rest = item.partition("{")
        if brace and not rest.endswith("}"):
            raise UserError(f"text after the closing brace in '{item}'")
        recipe = recipes().get(name.strip())
        if recipe is not None:
            if brace:
                raise UserError(
                    f"'{recipe.name}' is a recipe, and takes no options",
                    [f"it stands for {recipe.pipeline}"],
                    "write its passes with the options that you want",
                )
            yield from _parse(recipe.pipeline)
            continue
        values: dict[str, str | bool] = {}
        for option in _split(rest[:-1], text) if rest[:-1].strip() else ():
            key, equals, value = option.partition("=")
            value = value.strip()
            if len(value) > 1 and value[0] == value[-1] == '"':
                value = re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)
            if key.strip() in values:
                raise UserError(f"option '{key.strip()}' is given twice in '{item}'")
            values[key.strip()] = value if equals else True
        yield build(registry.find(name.strip()), values)


def _split(text: str, whole: str) -> list[str]:
    """Splits at commas outside braces and quotes."""
    parts, depth, quoted, escaped, start = [], 0, False, False, 0
    for position, character in enumerate(text):
        if escaped or (quoted and character == "\\"):
            escaped = not escaped
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in "{}":
            depth += 1 if character == "{" else -1
            if depth < 0:
                raise UserError(f"a '}}' without its '{{' in '{whole}'")
        elif character == "," and not depth and not quoted:
            parts.append(text[start:position])
            start = position + 1
    if depth or quoted:
        raise UserError(f"{'a quote' if quoted else 'a brace'} is not closed in '{whole}'")
    parts.append(text[start:])
    stripped = [part.strip() for part in parts]
    if not all(stripped):
        raise UserError(f"an empty item in '{whole}'", remedy="raise,fuse")
    return stripped
