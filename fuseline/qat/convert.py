"""`fuseline.convert`: a trained module as the quantized model that training saw."""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.formats import FORMATS
from ..compiler.ops.fake_quantize import learned_codes
from ..compiler.ops.staircase import placed
from ..compiler.plan import Plan, SitePlan
from ..compiler.planned import probe
from ..compiler.structure import describe_value
from ..optimize import optimize
from ..passes.calibrated import Method
from .module import QuantizationAware, Rounded


def convert(qat: QuantizationAware, **settings: Any) -> torch.nn.Module:
    """The model of `prepare_qat`, optimized with its pipeline: codes and scales are exactly those of `qat` in eval.

    It is as `fuseline.optimize(model, pipeline)` leaves a model: `generate()`, `fuseline.save`,
    `keep_originals=False`, kernels. `qat` shares its weights, and is not to be trained on from here: codes of ranges
    that were trained are refused for weights that changed since.

    Args:
        settings: those of `fuseline.optimize`.
    """
    if not isinstance(qat, QuantizationAware):
        raise UserError(
            f"convert takes what prepare_qat made, not {type(qat).__name__}",
            remedy="qat = fuseline.prepare_qat(model, pipeline, example)",
        )
    qat.eval()
    plan = plan_of(qat) if qat.pipeline.needs_data else None
    model: torch.nn.Module = optimize(qat.model, qat.pipeline, plan=plan, **settings)
    return model


@torch.no_grad()
def plan_of(qat: QuantizationAware) -> Plan:
    """What training found, site by site: as calibration would have decided it."""
    plan = Plan(str(qat.pipeline))
    named = (qat.model.named_parameters, qat.model.named_buffers)
    for name, tensor in (pair for each in named for pair in each(remove_duplicate=False)):  # tied ones by either name
        plan.model[name] = describe_value(tensor)
    step = next(step for step in qat.pipeline.passes if step.is_trained)
    decided: dict[str, SitePlan] = {}
    for rounded in qat.rounded:
        if rounded.key is not None:
            decision = _decision(qat, rounded)
            decided.update(dict.fromkeys(rounded.at, decision))
    for site, (steps, bits) in qat.thresholds().items():
        parts = zip(("edges", "step", "low"), placed(steps, bits), strict=True)
        decision = decided.get(site, SitePlan())
        placed_too = {**decision.tensors, **{name: tensor.cpu() for name, tensor in parts}}
        decided[site] = SitePlan(decision.structure, placed_too)
    plan.add(step, decided)
    if sum(other.name == step.name for other in qat.pipeline.passes) > 1:
        plan.passes[step.name] = None  # of several passes with one name, each has an identity of its own
    return plan


def _decision(qat: QuantizationAware, rounded: Rounded) -> SitePlan:
    weight, scheme = qat.weight(rounded), rounded.one.scheme
    group = scheme.group_of(weight.shape[-1])
    numbers, scale = learned_codes(weight, qat.range(rounded), scheme.format, group)
    if rounded.one.method is Method.PARQ:
        made = (numbers.float() * scale.float().unsqueeze(-1)).flatten(-2)
        if (made - weight.float()).abs().max() > 1e-2 * scale.float().max():
            raise UserError(
                f"the weights of {rounded.at[0]} do not lie on their grid",
                ["PARQ draws them there until its step `end`"],
                "train until then, with fuseline.qat.PARQ round the optimizer",
            )
    codes = FORMATS[scheme.format].element.codes(numbers).flatten(-2)
    structure = {"method": rounded.one.method.value, "probe": list(probe(weight))}
    return SitePlan(structure, {"codes": codes.cpu(), "scale": scale.cpu()})
