"""`method=awq` and `method=smooth`: factors for the input channels of products, decided from data and folded.

    awq      s = mean|x|^α / √(max·min of it)     α in 0, 0.05 … 1, by the error of the rounded products; α = 0 is none
    smooth   s = max|x|^α / max|W|^(1−α)          α given; the weights take over a part of the activations' range

The error of a candidate is Σ‖(W − round(W·diag(s))/s)·x‖² = tr(Δ·H·Δᵀ)/2, so that no activation is kept. Statistics
are those of the program as it is, unrounded. A channel that was zero throughout has s = 1. Sources: AWQ (Lin et al.,
2024), section 3.2; SmoothQuant (Xiao et al., 2023), equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from ...compiler.program import Program
from ...compiler.progress import steps
from ...compiler.rewriter import Rewriter
from ...compiler.schemes import Scheme
from ..quantize_sites import Site
from ..rotation.folds import Folds
from .folds import apply, find
from .inputs import Moments, moments
from .journal import Journal
from .methods import Method
from .stream import Stop, Stream

if TYPE_CHECKING:
    from ..quantize import Quantize

STEPS = 20


def decide_scales(step: Quantize, study: Study, decided: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """The factors of each site's input channels, or why they fold nowhere; decided: formats by site, where chosen."""
    program = study.program
    rewriter, folds = Rewriter(program, step.name), Folds(program, untie=False)
    stream = Stream(program, study.data, step.offload)
    journal = Journal(study.checkpoint, f"{step} on data {study.digest()}")
    groups = []
    for group in _groups(step, program):
        found = find([site.node for site in group], folds)
        if isinstance(found, str):
            for site in group:
                journal.decisions[rewriter.site(site.node)] = SitePlan({"unscaled": found})
        elif any(rewriter.site(site.node) not in journal.decisions for site in group):
            groups.append(group)
    try:
        for stop in steps(stream.stops(groups), "calibrating", total=len(groups)):
            seen = moments(stop.sites[0], rewriter.site(stop.sites[0].node), stop.x())
            schemes = [step.scheme(site, decided.get(rewriter.site(site.node))) for site in stop.sites]
            decision = _decision(step, stop, seen, [scheme for scheme in schemes if scheme is not None])
            for number, site in enumerate(stop.sites):  # the first holds the factors of all
                tensors = {} if number else decision.tensors
                journal.add(rewriter.site(site.node), SitePlan(decision.structure, tensors))
    except BaseException:
        journal.write()
        raise
    journal.close()
    return journal.decisions


def fold_scales(step: Quantize, program: Program, rewriter: Rewriter) -> None:
    """Folds the factors that a plan holds; a value's readers are replaced before anything that comes from them."""
    for group in _groups(step, program):
        decision = rewriter.decision(group[0].node)
        if decision is None:
            continue
        found = decision.structure.get("unscaled") or find([site.node for site in group], Folds(program, untie=False))
        if isinstance(found, str):
            for site in group:
                rewriter.refuse(site.node, found, "scales")
        else:
            apply(rewriter, found, decision.tensors["scale"])


def _groups(step: Quantize, program: Program) -> list[tuple[Site, ...]]:
    """Sites by what they read."""
    groups: dict[Node, list[Site]] = {}
    for site in step.admitted(program):
        groups.setdefault(site.x, []).append(site)
    return [tuple(group) for group in groups.values()]


def _decision(step: Quantize, stop: Stop, seen: Moments, schemes: Sequence[Scheme]) -> SitePlan:
    weights = [stop.weight(site) for site in stop.sites]
    structure = {"method": step.method.value, "rows": seen.rows, "channels": int(weights[0].shape[1])}
    if step.method is Method.SMOOTH:
        scales = smooth(weights, seen.largest[0], step.alpha)
        before, after = (float(v.max()) for v in (seen.largest[0], seen.largest[0] / scales))
        return SitePlan({**structure, "largest_before": before, "largest": after}, {"scale": scales.cpu()})
    alpha, scales, nearest, found = search(weights, seen, schemes)
    whole = cost(weights, [torch.zeros_like(weight) for weight in weights], seen.hessian[0])
    shares = {"error_nearest": nearest / whole if whole else 0.0, "error": found / whole if whole else 0.0}
    return SitePlan({**structure, "alpha": alpha, **shares}, {"scale": scales.cpu()})


def smooth(weights: Sequence[torch.Tensor], largest: torch.Tensor, alpha: float) -> torch.Tensor:
    """s [n] in float64, for weights [out, n] that read one value whose channels reach `largest`."""
    reach = torch.stack([weight.abs().amax(0).double() for weight in weights]).amax(0)
    scales = largest**alpha / reach ** (1 - alpha)
    return torch.where((largest > 0) & (reach > 0), scales, torch.ones_like(scales))


def search(
    weights: Sequence[torch.Tensor], seen: Moments, schemes: Sequence[Scheme]
) -> tuple[float, torch.Tensor, float, float]:
    """The best α, its s [n] in float64, and the errors without factors and with them.

    With `mse` the ranges are narrowed for the best candidate alone, and it is kept where it still is the better one.
    """
    candidates = [(step / STEPS, factors(seen.mean[0], step / STEPS)) for step in range(STEPS + 1)]
    hessian = seen.hessian[0]
    tried = [cost(weights, _rounded(weights, scales, schemes, narrowed=False), hessian) for _, scales in candidates]
    best = min(range(len(tried)), key=tried.__getitem__)
    nearest, found = (
        cost(weights, _rounded(weights, candidates[i][1], schemes, narrowed=True), hessian) for i in (0, best)
    )
    best = best if found < nearest else 0
    return *candidates[best], nearest, min(nearest, found)


def factors(mean: torch.Tensor, alpha: float) -> torch.Tensor:
    """mean^α, so that the largest and the smallest are each other's inverse; 1 where the mean is 0."""
    alive = mean > 0
    if not alive.any():
        return torch.ones_like(mean)
    scales = torch.where(alive, mean, mean[alive].min()).clamp(min=1e-4) ** alpha
    return torch.where(alive, scales / (scales.max() * scales.min()).sqrt(), torch.ones_like(scales))


def _rounded(
    weights: Sequence[torch.Tensor], scales: torch.Tensor, schemes: Sequence[Scheme], narrowed: bool
) -> list[torch.Tensor]:
    """What each weight stands for behind its factors."""
    found = []
    for weight, scheme in zip(weights, schemes, strict=True):
        scaled = (weight.double() * scales).to(weight.dtype)
        part = scheme.narrowed(scaled) if narrowed else 1.0
        found.append(scheme.rounded(scaled, part).double().div(scales).to(weight.dtype))
    return found


def cost(weights: Sequence[torch.Tensor], rounded: Sequence[torch.Tensor], hessian: torch.Tensor) -> float:
    """Σ tr(Δ·H·Δᵀ)."""
    total = 0.0
    for weight, other in zip(weights, rounded, strict=True):
        compute = torch.promote_types(weight.dtype, torch.float32)
        lost = weight.to(compute) - other.to(compute)
        total += float(((lost @ hessian.to(compute)) * lost).sum())
    return total
