"""What rounding a weight costs the model's results: by the results' own curvature, for every format from one run.

With z the results, δ = (Ŵ − W)·x what rounding changes of one product, and J the derivative of z by it, the divergence
of the predictions is KL ≈ ½·δᵀJᵀ·F·J·δ, F the Fisher information of the predictions. A label drawn from the model's own
predictions has a gradient g with E[ggᵀ] = JᵀFJ, so that ½·E[(g·δ)²] is the divergence: one backward pass gives it for
all sites and formats. For a model without logits a normal vector takes the label's place, and the cost is the squared
error as a share of Σ|z|². Tokens are taken to be independent, and so are sites.

Source: the Fisher metric as in SqueezeLLM (Kim et al., 2023), there with the data's labels and weight by weight, here
with drawn ones and by product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ...compiler.program import Program
from ...compiler.progress import steps
from ...compiler.schemes import Scheme
from ..quantize_sites import Site
from ..rotation.learning.losses import logits_position
from .inputs import as_rows, finite
from .running import Running

ROWS = 512
"""Tokens of a batch that formats are compared on."""


class Tangent(Running):
    """Runs a program and gives the gradient of a drawn label by the result of each site."""

    def __init__(self, program: Program, sites: Sequence[Site]):
        super().__init__(program)
        self.sites = {site.node: site for site in sites}
        self.read: dict[Node, torch.Tensor] = {}
        self.made: dict[Node, torch.Tensor] = {}

    def run_node(self, node: Node) -> Any:
        result = super().run_node(node)
        if node in self.sites:
            self.read[node] = self.env[self.sites[node].x].detach()
            if not result.requires_grad:
                result = result.detach().requires_grad_()
            self.made[node] = result
        return result

    def gradients(self, flat: Sequence[Any], generator: torch.Generator) -> tuple[Mapping[Node, torch.Tensor], int]:
        """By site, of its result's shape, zeros where the results do not depend on it; and the predictions made."""
        self.read.clear()
        self.made.clear()
        with torch.enable_grad():
            drawn, count = label(self.program, self(flat), generator)
            nodes = list(self.made)
            found = torch.autograd.grad(drawn, [self.made[node] for node in nodes], allow_unused=True)
        zeros = (torch.zeros_like(self.made[node]) if g is None else g for node, g in zip(nodes, found, strict=True))
        return dict(zip(nodes, zeros, strict=True)), count


def label(program: Program, results: Sequence[Any], generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """A number whose gradient g by the results has E[ggᵀ] = F; and how many predictions it sums over."""
    position = logits_position(program)
    if position is not None:
        logits = results[position].float().flatten(0, -2)
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
        return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum"), len(logits)
    floats = [r for r in results if isinstance(r, torch.Tensor) and r.is_floating_point()]
    size = sum(float(r.detach().float().square().sum()) for r in floats) ** 0.5
    total = torch.zeros(())
    for result in floats:
        normal = torch.randn(result.shape, generator=generator).to(result.device)
        total = total + (2**0.5 / max(size, 1e-30)) * (result.float() * normal).sum().cpu()
    return total, 1


def sensitivities(
    program: Program, sites: Sequence[Site], candidates: Sequence[Sequence[Scheme]], data: Sequence[Sequence[Any]]
) -> list[list[float]]:
    """For each site and each of its candidate schemes, the cost: of logits KL in nats a position, else a share.

    Memory is that of a training step on one batch, without the gradients of parameters.
    """
    tangent, generator = Tangent(program, sites), torch.Generator().manual_seed(0)
    costs = [[0.0] * len(schemes) for schemes in candidates]
    positions = 0
    for number, flat in enumerate(steps(data, "measuring sensitivities")):
        gradients, count = tangent.gradients(flat, generator)
        positions += count
        for i, site in enumerate(sites):
            (x,) = finite([tangent.read[site.node]], f"{site.path}, batch {number}")
            weight = tangent.weight(site.weight).detach()
            for j, cost in enumerate(_costs(site, weight, candidates[i], x, gradients[site.node])):
                costs[i][j] += cost
    return [[cost / max(1, positions) for cost in row] for row in costs]


@torch.no_grad()
def _costs(
    site: Site, weight: torch.Tensor, schemes: Sequence[Scheme], x: torch.Tensor, gradient: torch.Tensor
) -> list[float]:
    """½·Σ(g·δ)² over the tokens, for each scheme; a convolution's places are its tokens."""
    rows = as_rows(site, x)
    groups = len(rows)
    if site.kernel is not None:
        moved = gradient.unflatten(1, (groups, -1)).movedim(1, 0).movedim(2, -1)
        slopes = moved.reshape(groups, -1, moved.shape[-1])
    else:
        slopes = gradient.reshape(1, -1, gradient.shape[-1])
    count = rows.shape[1]
    taken = torch.linspace(0, count - 1, min(ROWS, count), device=rows.device).long()
    rows, slopes = (part[:, taken].float() for part in (rows, slopes))
    found = []
    for scheme in schemes:
        lost = (scheme.rounded(weight, scheme.narrowed(weight)) - weight).float().reshape(groups, -1, weight.shape[1])
        moved = ((rows @ lost.transpose(1, 2)) * slopes).sum(-1)
        found.append(0.5 * float(moved.square().sum()) * count / len(taken))
    return found
