"""Weights quantized by what they are multiplied with: the methods of `quantize` that decide from data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from .columns import decide_columns
from .findings import findings
from .methods import CALIBRATED, TRAINED, Method, check_options
from .scales import decide_scales, fold_scales

if TYPE_CHECKING:
    from ..quantize import Quantize

__all__ = ["CALIBRATED", "TRAINED", "Method", "check_options", "decide", "findings", "fold_scales"]


def decide(step: Quantize, study: Study) -> dict[str, SitePlan]:
    """What the step's method decides at each site.

    Raises:
        UserError: batches that the program cannot be run on, or that make values which are no finite numbers.
    """
    return decide_columns(step, study) if step.method is Method.GPTQ else decide_scales(step, study)
