"""Which expression makes a site's codes: by rounding, or as a plan has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..compiler.expressions import Decided, Expression, HalfQuadratic, Planned, Quantize as QuantizeExpression, Scale
from ..compiler.plan import SitePlan
from ..compiler.program import TRAINS
from ..compiler.rewriter import Rewriter
from ..compiler.schemes import Scheme
from .calibrated import TRAINED, Method
from .quantize_products import Coded
from .quantize_sites import Site

if TYPE_CHECKING:
    from .quantize import Quantize


def coded(step: Quantize, rewriter: Rewriter, site: Site) -> Coded | None:
    """A site's codes; None, and a recorded refusal, where the plan has none."""
    if TRAINS in rewriter.program.state:
        return Coded(site.weight, step.candidates(site.path)[0])  # rounded at each step, by what becomes of it
    decision = rewriter.decision(site.node) if step.method in PLANNED or step.bits else None
    if decision is None and (step.method in PLANNED or step.bits):
        return None
    if decision is not None and "reason" in decision.structure:
        rewriter.refuse(site.node, decision.structure["reason"])
        return None
    scheme = step.scheme(site, decision)
    assert scheme is not None
    if step.method is Method.HQQ:
        return Coded(HalfQuadratic(site.weight, scheme), scheme)
    if decision is None or step.method not in PLANNED:
        return Coded(QuantizeExpression(site.weight, scheme), scheme)
    device = str(site.node.meta["val"].device)
    found = {name: Planned.of(decision.tensors[name], device) for name in scheme.outputs}
    one, other = decision.structure["probe"]
    weight = shifted(site.weight, decision, device)
    return Coded(Decided(weight, found["codes"], found["scale"], found.get("zero"), (one, other)), scheme)


PLANNED = (Method.GPTQ, Method.FPQ, Method.LKD, *TRAINED)
"""Methods whose codes the plan holds."""


def shifted(weight: Expression, decision: SitePlan, device: str) -> Expression:
    """The weight with its columns multiplied by what the input's channels are divided by."""
    shift = decision.tensors.get("input_shift")
    return weight if shift is None else Scale(weight, Planned.of(1 / shift, device), 1)


def decided_activations(asked: Scheme, decision: SitePlan) -> Scheme:
    """The scheme of a site's input: what was asked for, or the format that a plan has."""
    text = decision.structure.get("activations")
    return asked if text is None else Scheme.parse(text, weights=False)
