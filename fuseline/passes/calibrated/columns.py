"""`method=gptq` for a program: sites in the graph's order, each by what it reads when those before it are rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ...compiler.framework import Study
from ...compiler.ops import decode, dequantize
from ...compiler.plan import SitePlan
from ...compiler.planned import probe
from ...compiler.progress import steps
from ...compiler.schemes import KERNELS, Scheme
from ..quantize_sites import Site
from .gptq import Rounded, gptq
from .inputs import Moments, groups_of, moments
from .journal import Journal
from .sites_after import sites_after
from .stream import Stop, Stream

if TYPE_CHECKING:
    from ..quantize import Quantize


def decide_columns(step: Quantize, study: Study, decided: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """Codes, scales and zero points of every site, or the reason why it has none.

    What rounds activations, keys and values at run time is put in first: it is part of what a site reads. decided:
    formats and ranges by site, where they were chosen before.
    """
    round_at_run_time = lambda program, rewriter: step.apply(program, rewriter, None)
    program, found, name_of = sites_after(step, study, decided, round_at_run_time)
    refused, groups = grouped(found)
    stream = Stream(program, study.data, step.offload)
    journal = Journal(study.checkpoint, f"{step} on data {study.digest()}")
    for site, reason in refused.items():
        journal.decisions[name_of[site.node]] = SitePlan({"reason": reason})
    try:
        for stop in steps(stream.stops(groups), "calibrating", total=len(groups)):
            stopped = [name_of[site.node] for site in stop.sites]
            schemes = [step.scheme(site, decided.get(name)) for site, name in zip(stop.sites, stopped, strict=True)]
            _decide(step, stop, stopped, schemes, journal)
    except BaseException:
        journal.write()
        raise
    journal.close()
    return journal.decisions


def grouped(found: Sequence[Site]) -> tuple[dict[Site, str], list[tuple[Site, ...]]]:
    """Sites that cannot be decided, and the others by what they read: these share a Hessian."""
    groups: dict[object, list[Site]] = {}
    refused: dict[Site, str] = {}
    readers: dict[object, list[Site]] = {}
    for site in found:
        readers.setdefault(site.weight, []).append(site)
    for site in found:
        uses = readers[site.weight]
        if len(uses) > 1:
            refused[site] = (
                f"its weight is used {len(uses)} times, and one choice of codes would have to serve them all"
            )
        else:
            key = (site.x, site.node if site.kernel else None)
            groups.setdefault(key, []).append(site)
    return refused, [tuple(group) for group in groups.values()]


def _decide(
    step: Quantize, stop: Stop, names: Sequence[str], chosen: Sequence[Scheme | None], journal: Journal
) -> None:
    schemes = [scheme for scheme in chosen if scheme is not None]
    weights = [stop.weight(site) for site in stop.sites]
    if all(name in journal.decisions for name in names):
        decisions = [journal.decisions[name] for name in names]
    else:
        seen = moments(stop.sites[0], names[0], stop.x())
        decisions = [SitePlan()] * len(names)
        for scheme in dict.fromkeys(schemes):  # rows of one scheme are rounded together
            of = [i for i, other in enumerate(schemes) if other == scheme]
            made = _decisions(step, [stop.sites[i] for i in of], [weights[i] for i in of], seen, scheme)
            for i, decision in zip(of, made, strict=True):
                decisions[i] = decision
    for site, name, weight, scheme, decision in zip(stop.sites, names, weights, schemes, decisions, strict=True):
        if "reason" not in decision.structure:
            stop.set(site, expanded(decision, scheme, weight))
        journal.add(name, decision)


def expanded(decision: SitePlan, scheme: Scheme, weight: torch.Tensor) -> torch.Tensor:
    """The matrix [out, in] that a decision's codes stand for, in the weight's dtype and on its device."""
    parts = {name: tensor.to(weight.device) for name, tensor in decision.tensors.items()}
    codes, group = scheme.pack(parts["codes"]), scheme.group_of(weight.shape[1])
    scale, zero = parts["scale"], parts.get("zero")
    made: torch.Tensor
    if scheme.format in KERNELS:
        made = dequantize.naive(codes, scale, zero, scheme.bits, group, weight.dtype)
    else:
        made = decode.naive(codes, scale, zero, None, scheme.format, group, True, weight.dtype)
    return made


def _decisions(
    step: Quantize, sites: Sequence[Site], weights: Sequence[torch.Tensor], seen: Moments, scheme: Scheme
) -> list[SitePlan]:
    """Rows are independent of each other: those of all sites are rounded together, a convolution's group by group."""
    rows = [len(weight) for weight in weights]
    parts = torch.cat(list(weights)).chunk(groups_of(sites[0]))
    try:
        done = [
            gptq(part, hessian, scheme, step.damp, step.static, step.order)
            for part, hessian in zip(parts, seen.hessian, strict=True)
        ]
    except ArithmeticError as error:
        return [SitePlan({"reason": str(error)}) for _ in sites]
    whole = {name: torch.cat([one.parts[name] for one in done]).split(rows) for name in done[0].parts}
    nearest, found, size = (torch.cat(each).split(rows) for each in zip(*_errors(done, parts, seen), strict=True))
    dead = int((seen.hessian.diagonal(dim1=1, dim2=2) == 0).sum())
    return [
        SitePlan(
            {
                "method": step.method.value,
                "rows": seen.rows,
                "channels": int(weight.shape[1]),
                "dead": dead,
                "damp": max(one.damp for one in done),
                "probe": list(probe(weight)),
                "error_nearest": _share(nearest[i], size[i]),
                "error": _share(found[i], size[i]),
            },
            {name: pieces[i].cpu().clone() for name, pieces in whole.items()},
        )
        for i, weight in enumerate(weights)
    ]


def _errors(
    done: Sequence[Rounded], parts: Sequence[torch.Tensor], seen: Moments
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each row's error to nearest, its error as chosen, and the size of its products, all squared."""
    result = []
    for one, part, hessian in zip(done, parts, seen.hessian, strict=True):
        weight = part.to(torch.promote_types(part.dtype, torch.float32))
        result.append((one.nearest, one.found, ((weight @ hessian.to(weight.dtype)) * weight).sum(-1)))
    return result


def _share(error: torch.Tensor, size: torch.Tensor) -> float:
    """Σ error² of the site's results, as a share of Σ result²."""
    whole = float(size.sum())
    return float(error.sum()) / whole if whole > 0 else 0.0
