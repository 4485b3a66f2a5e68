"""Deciding with data: which rotations pay, and matrices learned for the quantization that follows.

Both are judged by the program as the later passes leave it, run on the calibration batches. Source: SpinQuant (Liu et
al., 2024), section 3, where the matrices are learned on the next-token loss alone and all of them are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ....compiler.errors import UserError
from ....compiler.framework import Study
from ....compiler.plan import SitePlan
from ..rotations import Kind
from .choose import choose
from .findings import MODEL, findings
from .losses import Loss, criterion
from .matrices import LEARNT, learn
from .trial import Trial, Variants

if TYPE_CHECKING:
    from .. import Rotate

__all__ = ["LEARNT", "MODEL", "Loss", "Trial", "Variants", "decide", "findings"]


def decide(step: Rotate, study: Study) -> dict[str, SitePlan]:
    """The learned matrices at their sites, and for the whole model what was kept, why, and what was measured.

    Raises:
        UserError: no pass behind this one costs anything, or there is no batch.
    """
    if not study.data:
        raise UserError("learning and choosing rotations takes calibration batches", remedy="calibration=[(ids,), …]")
    variants = Variants(step, study.program, study.after)
    if not variants.after:
        raise UserError(
            f"'{step}' learns or chooses by what the passes behind it cost, and none of them is lossy without data",
            remedy=f"{step},quantize{{weights=int4:sym,activations=int8}}",
        )
    measure = criterion(step.loss, study.program)
    decisions: dict[str, SitePlan] = {}
    measured: dict[str, float] = {}
    if step.kind is Kind.LEARNED:
        decisions, measured = learn(step, variants, measure, study)
    keep, why = list(step.asked), dict[str, str]()
    if step.choose:
        keep, why, costs = choose(step, variants, measure, study, decisions)
        measured |= costs
    structure = {"keep": keep, "why": why, "loss": measure.name, "measured": measured}
    return {**decisions, MODEL: SitePlan(structure)}
