"""`method=fpq` for a program: formats and ranges of weights, and of static activations, site by site.

Sites come in the graph's order, each with what it reads when the weights before it are rounded. Products that read one
value share its rounding. How a product is searched: `float_search.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from ...compiler.planned import probe
from ...compiler.progress import steps
from ...compiler.schemes import Scheme
from .columns import expanded, grouped
from .float_search import Input, choose_input, choose_weight, nearest_input, to_nearest
from .inputs import as_rows, finite
from .journal import Journal
from .sites_after import sites_after
from .stream import Stop, Stream

if TYPE_CHECKING:
    from ..quantize import Quantize

SAMPLES = 512
"""Tokens that a product is searched with, spread over all batches; LLM-FP4 takes 32 sequences."""


def decide_floats(step: Quantize, study: Study, decided: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """Codes, scales and formats of every site, and its input's format, range and shifts where `activations` is static.

    What else is rounded at run time, keys and values and inputs by token, is put in first.
    """
    activations = step.schemes()["activations"]
    static = activations if activations is not None and activations.static else None
    around = replace(step, activations=None) if static else step
    round_at_run_time = lambda program, rewriter: around.apply(program, rewriter, None)
    program, found, name_of = sites_after(step, study, decided, round_at_run_time)
    refused, groups = grouped(found)
    journal = Journal(study.checkpoint, f"{step} on data {study.digest()}")
    for site, reason in refused.items():
        journal.decisions[name_of[site.node]] = SitePlan({"reason": reason})
    for group in [group for group in groups if group[0].kernel is not None]:
        groups.remove(group)
        journal.decisions[name_of[group[0].node]] = SitePlan({"reason": "fpq searches matrices, not convolutions"})
    stream = Stream(program, study.data, step.offload)
    try:
        for stop in steps(stream.stops(groups), "calibrating", total=len(groups)):
            stopped = [name_of[site.node] for site in stop.sites]
            schemes = [step.scheme(site, decided.get(name)) for site, name in zip(stop.sites, stopped, strict=True)]
            weights = [stop.weight(site) for site in stop.sites]
            made = [journal.decisions[name] for name in stopped if name in journal.decisions]
            if len(made) < len(stopped):
                made = _decisions(step, stop, stopped[0], weights, [s for s in schemes if s is not None], static)
            for site, name, weight, decision in zip(stop.sites, stopped, weights, made, strict=True):
                scheme = Scheme.parse(decision.structure["scheme"], weights=True)
                matrix = expanded(decision, scheme, weight)
                shift = decision.tensors.get("input_shift")
                stop.set(site, matrix if shift is None else matrix * shift.to(matrix))
                journal.add(name, decision)
    except BaseException:
        journal.write()
        raise
    journal.close()
    return journal.decisions


def _decisions(
    step: Quantize,
    stop: Stop,
    name: str,
    weights: Sequence[torch.Tensor],
    schemes: Sequence[Scheme],
    static: Scheme | None,
) -> list[SitePlan]:
    x = _samples(stop, name)
    rough = nearest_input(x, static) if static else Input(x)
    seen = choose_input(x, torch.cat(list(weights)), static, step.among) if static else rough
    made = []
    for weight, scheme in zip(weights, schemes, strict=True):
        shift = torch.ones_like(x[0]) if seen.shift is None else seen.shift
        folded = weight / shift.to(weight)
        chosen, part, error = choose_weight(folded, x * shift, seen.rounded * shift, scheme, step.among)
        whole = float((x @ weight.to(x).t()).square().sum())
        before = to_nearest(weight, x, rough.rounded, scheme)
        groups, grid = chosen.grid(folded)
        scale, zero = grid.of(groups, part)
        parts = chosen.stored(folded, grid, grid.codes(groups, scale, zero), scale, zero)
        structure = {
            "method": step.method.value,
            "scheme": str(chosen),
            "rows": len(x),
            "channels": int(weight.shape[1]),
            "probe": list(probe(folded)),
            "error_nearest": before / whole if whole else 0.0,
            "error": error / whole if whole else 0.0,
        }
        tensors = {key: tensor.cpu() for key, tensor in parts.items()}
        if static and seen.scheme is not None and seen.scale is not None and seen.shift is not None:
            structure["activations"] = str(seen.scheme)
            tensors |= {"input_scale": seen.scale.cpu(), "input_shift": seen.shift.cpu()}
        made.append(SitePlan(structure, tensors))
    return made


def _samples(stop: Stop, name: str) -> torch.Tensor:
    """Rows of what the sites read, [at most SAMPLES, n], of every batch as many."""
    batches = [as_rows(stop.sites[0], x)[0] for x in finite(stop.x(), name)]
    each = max(1, SAMPLES // len(batches))
    taken = [rows[torch.linspace(0, len(rows) - 1, min(each, len(rows))).long()] for rows in batches]
    rows = torch.cat(taken)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))
