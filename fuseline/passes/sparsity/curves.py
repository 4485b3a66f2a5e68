"""What a mask costs the model, at each group by itself, as a function of its fraction and rank: to second order.

A change δ of a product's result changes the predictions by a divergence of ½·δᵀ·F·δ, with F the Fisher information.
With labels drawn from the model's own predictions, F is the mean of g·gᵀ, where g is the gradient of −log p(label);
positions are taken to err independently of each other. So one backward pass a batch gives, for every group, fraction
and rank,

    cost(f, r) = ½·mean over positions of (gᵀ·(W − up·down)·t)²,      t: what the mask drops.

A program without logits is asked for Σ|Δ|² of its results in the same way, with random signs for the gradient
(Hutchinson). Source: second-order sensitivities as in Optimal Brain Damage (LeCun et al., 1990), of activations here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ...compiler.program import Program
from ...compiler.progress import steps
from ..quantize_sites import Site
from ..rotation.learning.losses import logits_position
from .factors import LowRank
from .groups import Group
from .samples import Sample
from .trial import Masked

FRACTIONS = tuple(round(0.05 * i, 2) for i in range(1, 21))
RANKS = (0, 8, 16, 32, 64, 128, 256, 512)
WIDEST = 0.25
"""The largest share of a group's bytes that its low-rank branch may take."""


def ranks(group: Group, limit: float = WIDEST) -> tuple[int, ...]:
    """The ranks that are tried at a group."""
    return tuple(r for r in RANKS if r * (group.n + group.m) <= limit * group.n * group.m)


@dataclass
class Curve:
    """costs: [fractions, ranks], with FRACTIONS and `ranks` of the group; between fractions it is interpolated."""

    group: Group
    ranks: tuple[int, ...]
    costs: torch.Tensor
    _listed: list[list[float]] = field(default_factory=list, repr=False)

    def at(self, fraction: float, rank: int) -> float:
        """The cost; linear between the fractions of the table, and below the first one like 1/f."""
        self._listed = self._listed or self.costs.t().tolist()
        column = self._listed[self.ranks.index(rank)]
        if fraction <= FRACTIONS[0]:
            return column[0] * FRACTIONS[0] / max(fraction, 1e-3)
        place = min((fraction - FRACTIONS[0]) / (FRACTIONS[1] - FRACTIONS[0]), len(FRACTIONS) - 1)
        low = min(int(place), len(FRACTIONS) - 2)
        return column[low] + (column[low + 1] - column[low]) * (place - low)

    def fraction(self, share: float, rank: int) -> float:
        """The fraction of channels that can be kept where `share` of the group's bytes may be read."""
        group = self.group
        return min(1.0, share - rank * (group.n + group.m) / (group.n * group.m))

    def best(self, share: float, lean: float = 1.0) -> tuple[float, int, float]:
        """Fraction, rank and cost of the best split of a share of the group's bytes.

        lean: what costs with a low-rank branch are multiplied by; infinity: no branch.
        """
        options = []
        for rank in self.ranks:
            fraction = self.fraction(share, rank)
            if rank == 0 or (fraction >= FRACTIONS[0] / 2 and lean < math.inf):
                options.append((self.at(fraction, rank) * (lean if rank else 1.0), -rank, fraction, rank))
        cost, _, fraction, rank = min(options)
        return max(fraction, 0.0), rank, cost


def curves(
    program: Program,
    found: Mapping[Group, Sample],
    factors: Mapping[Group, LowRank],
    data: Sequence[Sequence[Any]],
    seed: int,
) -> dict[Group, Curve]:
    """The cost of every group, by fraction and rank."""
    draw = torch.Generator().manual_seed(seed)
    position = logits_position(program)
    made = {group: Curve(group, ranks(group), torch.zeros(len(FRACTIONS), len(ranks(group)))) for group in found}
    thresholds = {group: [sample.threshold(f) for f in FRACTIONS] for group, sample in found.items()}
    watched = Watched(program, list(found))
    rows = 0
    for flat in steps(data, "measuring sensitivities", total=len(data)):
        with torch.enable_grad():
            loss, count = _drawn(watched(flat), position, draw)
            outputs = [y for ys in watched.outputs.values() for y in ys]
            gradients = iter(torch.autograd.grad(loss, outputs))
        rows += count
        for group in found:
            g = torch.cat([next(gradients).reshape(-1, site.shape[0]).float() for site in group.sites], 1)
            x = watched.inputs_of[group].reshape(-1, group.n).float()
            weight = torch.cat([watched.matrix(site) for site in group.sites])
            _add(made[group], x, g, weight, factors.get(group), thresholds[group])
        watched.clear()
    for curve in made.values():
        curve.costs *= 0.5 / max(1, rows)
        curve.costs[-1, 0] = 0.0  # nothing is dropped
    return made


def _add(
    curve: Curve,
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor,
    factors: LowRank | None,
    thresholds: Sequence[torch.Tensor],
) -> None:
    through = (g @ weight.float()) * x  # what each channel takes part in the change
    a = g @ factors.up.to(g).t() if factors is not None else None
    for i, threshold in enumerate(thresholds):
        dropped = x.abs() <= threshold.to(x.device)
        change = through.masked_fill(~dropped, 0).sum(1)
        curve.costs[i, 0] += float(change.square().sum())
        if factors is None or a is None or len(curve.ranks) == 1:
            continue
        z = x.masked_fill(~dropped, 0) @ factors.down.to(x).t()
        made_up = (z * a).cumsum(1)
        for j, rank in enumerate(curve.ranks[1:], 1):
            curve.costs[i, j] += float((change - made_up[:, rank - 1]).square().sum())


def _drawn(results: Sequence[Any], position: int | None, draw: torch.Generator) -> tuple[torch.Tensor, int]:
    """A loss whose gradients' squares are the second derivative sought, and the positions that it is a sum over."""
    if position is not None:
        logits = results[position].flatten(0, -2).float()
        noise = torch.rand(logits.shape, generator=draw).clamp_(1e-9, 1 - 1e-7).to(logits.device)
        labels = (logits.detach() - torch.log(-torch.log(noise))).argmax(-1)  # Gumbel's way to draw from a softmax
        return F.cross_entropy(logits, labels, reduction="sum"), len(logits)
    total, count = torch.zeros(()), 0
    for result in results:
        if isinstance(result, torch.Tensor) and result.is_floating_point() and result.requires_grad:
            signs = torch.randint(0, 2, result.shape, generator=draw).to(result) * 2 - 1
            total = total.to(result.device) + (result * signs).sum()
            count = max(count, result.numel() // max(1, result.shape[-1]))
    return total, count


class Watched(Masked):
    """A program that keeps what its groups read, and what their products give, as leaves of autograd."""

    def __init__(self, program: Program, groups: Sequence[Group]):
        super().__init__(program)
        self.group_of = {site.node: group for group in groups for site in group.sites}
        self.outputs: dict[Group, list[torch.Tensor]] = {group: [] for group in groups}
        self.inputs_of: dict[Group, torch.Tensor] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        group = self.group_of.get(node)
        if group is None:
            return result
        self.inputs_of[group] = self.env[group.sites[0].x].detach()
        if not result.requires_grad:
            result = result.detach().requires_grad_()
        self.outputs[group].append(result)
        return result

    def matrix(self, site: Site) -> torch.Tensor:
        """A product's weight [out, in]."""
        return self.weight(site.weight).detach()

    def clear(self) -> None:
        """Forgets a run."""
        for kept in self.outputs.values():
            kept.clear()
        self.inputs_of.clear()
