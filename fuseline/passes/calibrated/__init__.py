"""What `quantize` decides from data: formats, factors of channels, ranges of activations, and codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from .allot import decide_formats
from .budget import ladder
from .columns import decide_columns
from .distil import decide_by_distillation
from .findings import findings
from .floats import decide_floats
from .methods import CALIBRATED, TRAINED, Method, check_options
from .ranges import decide_ranges
from .scales import decide_scales, fold_scales

if TYPE_CHECKING:
    from ..quantize import Quantize

__all__ = ["CALIBRATED", "TRAINED", "Method", "check_options", "decide", "findings", "fold_scales", "ladder"]

METHODS = {
    Method.AWQ: decide_scales,
    Method.SMOOTH: decide_scales,
    Method.GPTQ: decide_columns,
    Method.FPQ: decide_floats,
    Method.LKD: decide_by_distillation,
}


def decide(step: Quantize, study: Study) -> dict[str, SitePlan]:
    """What is decided at each site: its format, then factors, the range of what it reads, and its codes.

    Raises:
        UserError: batches that the program cannot be run on, or that make values which are no finite numbers.
    """
    activations = step.schemes()["activations"]
    phases = [decide_formats] if step.bits else []
    if step.method in (Method.AWQ, Method.SMOOTH):
        phases.append(METHODS[step.method])
    if activations is not None and activations.static and step.method is not Method.FPQ:
        phases.append(decide_ranges)
    if step.method in (Method.GPTQ, Method.FPQ, Method.LKD):
        phases.append(METHODS[step.method])
    decided: dict[str, SitePlan] = {}
    for phase in phases:
        for site, found in phase(step, study, decided).items():
            held = decided.get(site, SitePlan())
            decided[site] = SitePlan(held.structure | found.structure, held.tensors | found.tensors)
    return decided
