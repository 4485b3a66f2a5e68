"""Print: the program as code after some passes; and StopAfter: a pipeline's prefix, to the single rewrite."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..action import Action, Observer, PassEnds
from ..errors import UserError, nearest
from ..framework import Pass
from ..program import Program
from ..report import PassReport
from ..stage.render import code
from ..structure import structural_hash

if TYPE_CHECKING:
    from ..pipeline import Pipeline


class Print(Observer):
    """Writes the program after passes.

    Args:
        after: "all", "changed" (judged by the graph's structure, not by what the pass says) or a pass's name.
        write: takes the text.
    """

    def __init__(self, after: str, write: Callable[[str], None]):
        self.after, self._write = after, write

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        names = [step.name for step in pipeline.passes]
        if self.after not in ("all", "changed", *names):
            raise UserError(f"no pass '{self.after}' in the pipeline{nearest(self.after, ['all', 'changed', *names])}")
        self._hash = structural_hash(program)

    def pass_ends(self, step: Pass, program: Program, report: PassReport) -> None:
        before, self._hash = self._hash, structural_hash(program)
        wanted = self.after in ("all", step.name) or (self.after == "changed" and self._hash != before)
        if wanted:
            self._write(f"# after {step}: {report.matched} rewrites, {len(report.refused)} refused\n{code(program)}")


class StopAfter(Observer):
    """Ends a pass after its first `count` rewrites."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def allows(self, action: Action) -> bool:
        if action.pass_name == self.name:
            if self.count <= 0:
                raise PassEnds
            self.count -= 1
        return True


def stop_after(pipeline: Pipeline, text: str) -> tuple[Pipeline, list[Observer]]:
    """The passes up to the one that `NAME` or `NAME:N` names; with N, only its first N rewrites.

    Raises:
        UserError: no such pass in the pipeline, or N is no number.
    """
    name, colon, count = text.partition(":")
    names = [step.name for step in pipeline.passes]
    if name not in names:
        raise UserError(f"no pass '{name}' in the pipeline{nearest(name, names)}")
    if colon and not count.isdigit():
        raise UserError(f"'{count}' is no number of rewrites", remedy=f"--stop-after {name}:10")
    kept = type(pipeline)(pipeline.passes[: names.index(name) + 1])
    return kept, [StopAfter(name, int(count))] if colon else []
