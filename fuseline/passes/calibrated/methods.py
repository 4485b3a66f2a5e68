"""How codes are chosen, and which options belong to which method."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

from ...compiler.errors import UserError
from ...compiler.formats import Float
from ...compiler.schemes import Scheme
from .budget import Budget, ladder
from .observers import Observer

if TYPE_CHECKING:
    from ..quantize import Quantize


class Method(enum.Enum):
    """See the page of `quantize`."""

    RTN = "rtn"  # to nearest
    HQQ = "hqq"  # ranges by half-quadratic splitting
    GPTQ = "gptq"  # columns make up for what those before them lost
    AWQ = "awq"  # channels scaled by what they are multiplied with, the exponent searched
    SMOOTH = "smooth"  # channels scaled, so that activations are easier to round
    FPQ = "fpq"  # floating-point formats and their ranges, by the products' error
    LKD = "lkd"  # part by part, weights trained to give what the part gave
    PARETOQ = "paretoq"  # ranges that training learns
    PARQ = "parq"  # weights that an optimizer draws to the grid


CALIBRATED = (Method.GPTQ, Method.AWQ, Method.SMOOTH, Method.FPQ, Method.LKD)
"""Those that decide from data."""
TRAINED = (Method.PARETOQ, Method.PARQ)
"""Those whose codes come out of training."""

_OF = {
    "static": (Method.GPTQ,),
    "order": (Method.GPTQ,),
    "damp": (Method.GPTQ,),
    "alpha": (Method.SMOOTH,),
    "rounds": (Method.LKD,),
}


def check_options(step: Quantize) -> None:
    """Refuses options that say nothing to the step's method.

    Raises:
        UserError: naming the option and the method that it belongs to.
    """
    method, example = step.method, "quantize{weights=int4:g64,method=gptq}"
    _check_formats(step)
    if method is Method.SMOOTH and not step.activations:
        raise UserError(
            "method=smooth makes activations easier to round, and none are",
            remedy="quantize{weights=int8,activations=int8,method=smooth}",
        )
    if method in (Method.GPTQ, Method.AWQ, Method.HQQ, Method.FPQ, Method.LKD) and not step.weights:
        raise UserError(f"method={method.value} chooses the codes of weights, and none are rounded", remedy=example)
    for scheme in weight_schemes(step):
        if method in (Method.GPTQ, Method.HQQ) and (scheme.rows != 1 or scheme.of.scaling != "real"):
            raise UserError(
                f"method={method.value} fits real scales of a channel or group, and '{scheme}' has others",
                remedy=example.replace("gptq", method.value),
            )
        if method in (Method.FPQ, Method.LKD) and scheme.of.scaling == "e4m3":
            raise UserError(
                f"method={method.value} keeps one scale a group, and '{scheme}' has one more for the tensor",
                remedy=f"weights={scheme.element.name}:g16",
            )
    for name, methods in _OF.items():
        if getattr(step, name) != getattr(type(step), name) and method not in methods:
            raise UserError(f"'{name}' says nothing to method={method.value}", remedy=f"method={methods[0].value}")
    if step.offload and not step.needs_data:
        raise UserError("'offload' says nothing where no data is looked at", remedy="method=gptq")
    if step.order and not step.static:
        raise UserError(
            "columns keep their groups in another order only where scales are known before: 'order' needs 'static'",
            remedy=example.replace("gptq}", "gptq,static,order}"),
        )
    if step.rounds < 1:
        raise UserError("rounds is 1 or more")
    if step.damp <= 0 or not 0 <= step.alpha <= 1:
        raise UserError("damp is above 0, and alpha between 0 and 1")


def weight_schemes(step: Quantize) -> list[Scheme]:
    """All schemes that weights may be rounded to.

    Raises:
        UserError: one that cannot be read, or an override without a pattern.
    """
    found = []
    for override in step.overrides:
        pattern, colon, text = override.partition(":")
        if not pattern or not colon:
            raise UserError(
                f"'{override}' is no override: a pattern of module paths and a format",
                remedy="overrides=*.down_proj:int8|*.o_proj:int6:g64",
            )
        found.append(Scheme.parse(text, weights=True))
    weights = step.schemes()["weights"]
    return [*found, *(ladder(weights, step.among) if step.bits and weights else [weights] if weights else [])]


def _check_formats(step: Quantize) -> None:
    """Refuses options that choose among formats, or ranges, where there is nothing to choose."""
    activations = step.schemes()["activations"]
    if (step.overrides or step.bits) and not step.weights:
        word = "overrides" if step.overrides else "bits"
        raise UserError(
            f"'{word}' is about weights, and none are rounded", remedy=f"quantize{{weights=int4:g64,{word}=…}}"
        )
    if step.among and not step.bits and step.method is not Method.FPQ:
        raise UserError(
            "'among' says what 'bits' or method=fpq choose from, and neither was given", remedy="bits=auto:4bits"
        )
    if step.bits:
        Budget.parse(step.bits)
    static = bool(activations and activations.static)
    if step.observe != "largest" and not static:
        raise UserError(
            "'observe' finds the ranges of static activations, and there are none", remedy="activations=int8:static"
        )
    Observer.parse(step.observe)
    if step.method is Method.FPQ and any(not isinstance(s.element, Float) for s in weight_schemes(step)):
        raise UserError("method=fpq chooses among floating-point formats", remedy="quantize{weights=fp4,method=fpq}")
