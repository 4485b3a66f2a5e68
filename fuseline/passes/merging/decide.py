"""What `merge-experts` decides at each layer: pairs, groups, those that stay, or ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...compiler.expert_expressions import merged
from ...compiler.framework import Study
from ...compiler.plan import SitePlan
from ...compiler.program import Program
from ...compiler.progress import steps
from ...compiler.sites import sites
from . import grouping
from .layers import Layer, layers, stacked
from .milo import kurtosis, ranks
from .options import Importance, Method, Pairs, Ranks, Router, Saliency
from .routing import router
from .statistics import Statistics, statistics

if TYPE_CHECKING:
    from . import MergeExperts

ROWS = 16
"""Rows of each matrix that the search for pairs compares."""


def decide(step: MergeExperts, study: Study) -> dict[str, SitePlan]:
    """A decision a layer, from data where the options want it."""
    program, names = study.program, sites(study.program.graph)
    found = [one for one in layers(program, step.only, step.skip) if isinstance(one, Layer)]
    watched = statistics(program, found, study.data) if step.needs_data and found else {}
    flat = study.data[0] if study.data else None
    lookup = parameters(program, flat)
    decisions = {}
    for layer in steps(found, "merging experts", total=len(found)):
        name = names[layer.node]
        decisions[name] = decision(step, layer, name, lookup, watched.get(layer))
    return decisions


def parameters(program: Program, flat: Any = None) -> Any:
    """A parameter's tensor by its name."""
    sources = program.sources
    return lambda name: (sources[name].tensor if flat is None else flat[sources[name].index]).detach()


@torch.no_grad()
def decision(step: MergeExperts, layer: Layer, name: str, lookup: Any, seen: Statistics | None) -> SitePlan:
    """Of one layer; name: its site, which random choices depend on; seen: None where no data is needed."""
    seed = int.from_bytes(hashlib.sha256(f"{step.seed} {name}".encode()).digest()[:4], "little")
    about: dict[str, Any] = {"experts": layer.experts}
    if seen is not None:
        about["tokens"] = [int(n) for n in seen.tokens.tolist()]
        about["unseen"] = int((seen.tokens == 0).sum())
    if step.method is Method.PUZZLE:
        return _puzzle(step, layer, seed, lookup, seen, about)
    if step.method is Method.MILO:
        return SitePlan(about | {"ranks": _ranks(step, layer, lookup, seen)})
    kept = layer.experts - int(step.ratio * layer.experts)
    reason, blocks = _sliced(step, layer, kept)
    if reason:
        return SitePlan(about | {"reason": reason})
    groups, shares = _groups(step, layer, kept, blocks, seed, seen)
    rows = [max(group, key=lambda e: _weight(step, seen, e)) for group in groups]
    order = sorted(range(len(groups)), key=rows.__getitem__)  # the kept rows of the router stay in their order
    about |= {"groups": [list(groups[i]) for i in order], "shares": [list(shares[i]) for i in order]}
    return SitePlan(about | {"rows": [rows[i] for i in order]})


def _weight(step: MergeExperts, seen: Statistics | None, e: int) -> float:
    """What decides whose row of the router a group has."""
    return 0.0 if seen is None else float(importance(step, seen)[e])


def importance(step: MergeExperts, seen: Statistics) -> torch.Tensor:
    """Of each expert, [E]."""
    if step.method is Method.HC or step.importance is Importance.FREQUENCY:
        return seen.frequency
    return seen.gates if step.importance is Importance.GATE else seen.reap


def _sliced(step: MergeExperts, layer: Layer, kept: int) -> tuple[str | None, int]:
    """Why a router cannot lose rows, and among how many groups of experts it chooses first."""
    if step.routes is not Router.SLICE:
        return None, 1
    found = router(layer)
    if isinstance(found, str):
        return found, 1
    if kept < layer.chosen:
        return f"{layer.chosen} experts are chosen for each token, and {kept} would be left: a lower ratio", 1
    if kept % found.blocks or (found.blocks > 1 and kept // found.blocks < 2):
        return f"the router chooses among {found.blocks} groups, and {kept} experts are not as many in each", 1
    return None, found.blocks


def _groups(
    step: MergeExperts, layer: Layer, kept: int, blocks: int, seed: int, seen: Statistics | None
) -> tuple[grouping.Groups, grouping.Shares]:
    if step.method is Method.AVERAGE:
        groups = grouping.random_groups(layer.experts, kept, seed)
        return groups, tuple((1.0 / len(group),) * len(group) for group in groups)
    assert seen is not None
    ranked = importance(step, seen)
    if step.method is Method.REAP:
        groups = tuple((e,) for e in grouping.most_important(ranked, kept, blocks))
        return groups, ((1.0,),) * len(groups)
    if step.method is Method.PARTIAL:
        groups = grouping.absorbed(ranked, grouping.cosines(seen.outputs), kept, blocks)
        return groups, grouping.weighted(groups, ranked)
    each, found = layer.experts // blocks, []
    for block in range(blocks):
        part = grouping.clusters(seen.outputs[block * each : (block + 1) * each], kept // blocks)
        found += [tuple(e + block * each for e in group) for group in part]
    return tuple(found), grouping.weighted(tuple(found), ranked)


def _puzzle(
    step: MergeExperts, layer: Layer, seed: int, lookup: Any, seen: Statistics | None, about: dict[str, Any]
) -> SitePlan:
    count = min(int(step.ratio * layer.experts), layer.experts // 2)
    norms = {}
    if step.saliency is Saliency.ACTIVATION:
        assert seen is not None
        norms = {"gate_up": _norms(seen.inputs, seen.tokens), "down": _norms(seen.inner, seen.tokens)}
    if step.pairs is Pairs.RANDOM:
        pairs = grouping.random_pairs(layer.experts, count, seed)
    else:
        pairs = grouping.searched_pairs(pair_costs(layer, lookup, step.tau, norms), count)
    return SitePlan(about | {"pairs": [list(pair) for pair in pairs]}, norms)


def _norms(norms: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Norms [E, n]; those of an expert that no token chose are the mean token's."""
    mean = (norms.square().sum(0) / tokens.sum().clamp_min(1)).sqrt()
    return torch.where((tokens > 0)[:, None], norms, mean).contiguous()


def pair_costs(layer: Layer, lookup: Any, tau: float, norms: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What merging two experts costs, [E, E]: Σ (ŵ − w)²·norm² of both, relative to Σ w²·norm², on some rows."""
    cost = torch.zeros(layer.experts, layer.experts)
    for name, stack in zip(("gate_up", "down"), stacked(layer, lookup), strict=True):
        rows = (
            torch.arange(min(ROWS, stack.shape[1]), device=stack.device) * stack.shape[1] // min(ROWS, stack.shape[1])
        )
        some = stack[:, rows].float()
        scale = torch.ones(layer.experts, 1, stack.shape[2], device=stack.device)
        if name in norms:
            scale = norms[name].to(stack.device).unsqueeze(1)
        size = (some * scale).square().sum((1, 2)).clamp_min(1e-30)
        for i in range(1, layer.experts):
            one = some[i].expand_as(some[:i])
            pair, norm = torch.stack((one, some[:i])), torch.stack((scale[i].expand_as(scale[:i]), scale[:i]))
            magnitude, masks = merged(pair, tau, norm)
            gap = ((magnitude * masks - pair.abs()) * norm).square().sum((2, 3))
            cost[i, :i] += (gap[0] / size[i] + gap[1] / size[:i]).cpu()
    return cost + cost.t()


def _ranks(step: MergeExperts, layer: Layer, lookup: Any, seen: Statistics | None) -> list[int]:
    tails = [0.0] * layer.experts
    if step.ranks is Ranks.KURTOSIS:
        matrices = stacked(layer, lookup)
        tails = [kurtosis([stack[e] for stack in matrices]) for e in range(layer.experts)]
    often = [1.0] * layer.experts if seen is None else seen.frequency.tolist()
    return ranks(step.ranks, step.rank, tails, often, min(layer.hidden, layer.inner))
