"""How codes are chosen, and which options belong to which method."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from ...compiler.errors import UserError

if TYPE_CHECKING:
    from ..quantize import Quantize


class Method(enum.Enum):
    """See the page of `quantize`."""

    RTN = "rtn"  # to nearest
    HQQ = "hqq"  # ranges by half-quadratic splitting
    GPTQ = "gptq"  # columns make up for what those before them lost
    AWQ = "awq"  # channels scaled by what they are multiplied with, the exponent searched
    SMOOTH = "smooth"  # channels scaled, so that activations are easier to round
    PARETOQ = "paretoq"  # ranges that training learns
    PARQ = "parq"  # weights that an optimizer draws to the grid


CALIBRATED = (Method.GPTQ, Method.AWQ, Method.SMOOTH)
"""Those that decide from data."""
TRAINED = (Method.PARETOQ, Method.PARQ)
"""Those whose codes come out of training."""

_OF = {
    "static": (Method.GPTQ,),
    "order": (Method.GPTQ,),
    "damp": (Method.GPTQ,),
    "alpha": (Method.SMOOTH,),
    "offload": CALIBRATED,
}


def check_options(step: Quantize) -> None:
    """Refuses options that say nothing to the step's method.

    Raises:
        UserError: naming the option and the method that it belongs to.
    """
    method, example = step.method, "quantize{weights=int4:g64,method=gptq}"
    if method is Method.SMOOTH and not step.activations:
        raise UserError(
            "method=smooth makes activations easier to round, and none are",
            remedy="quantize{weights=int8,activations=int8,method=smooth}",
        )
    if method in (Method.GPTQ, Method.AWQ, Method.HQQ) and not step.weights:
        raise UserError(f"method={method.value} chooses the codes of weights, and none are rounded", remedy=example)
    weights = step.schemes()["weights"]
    if method in (Method.GPTQ, Method.HQQ) and weights and (weights.rows != 1 or weights.of.scaling != "real"):
        raise UserError(
            f"method={method.value} fits real scales of a channel or group, and '{step.weights}' has others",
            remedy=example.replace("gptq", method.value),
        )
    for name, methods in _OF.items():
        if getattr(step, name) != getattr(type(step), name) and method not in methods:
            raise UserError(f"'{name}' says nothing to method={method.value}", remedy=f"method={methods[0].value}")
    if step.order and not step.static:
        raise UserError(
            "columns keep their groups in another order only where scales are known before: 'order' needs 'static'",
            remedy=example.replace("gptq}", "gptq,static,order}"),
        )
    if step.damp <= 0 or not 0 <= step.alpha <= 1:
        raise UserError("damp is above 0, and alpha between 0 and 1")
