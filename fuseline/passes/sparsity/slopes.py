"""What more of each group's channels would save the whole model, at the masks that all groups have.

`curves.py` costs each group by itself, near the dense model. At half sparsity the others' errors are in every value,
and what a channel is worth there is another number: a derivative. With m the mask of a group,

    y = W·(m∘x) + up·down·((1 − m)∘x),

one backward pass gives ∂loss/∂m for every row and channel; its sum over the channels between two thresholds is, to
first order, what the loss would change by between two fractions.

What an earlier group changes moves channels of later ones across their thresholds, each of which is a jump by t. Over
many channels that is a slope: σ(x) = x·[|x| > t] has the derivative [|x| > t] + t·δ(|x| − t), and δ is spread over the
channels in a band around t. Without it gradients through half-sparse groups are half of what they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ...compiler.program import Program
from ..rotation.learning.losses import Criterion
from .budgets import Choices
from .groups import Group
from .samples import Sample
from .trial import Mask, Masked

BAND = 0.03
"""Slopes are taken between the fraction less this and the fraction and this."""

JUMPS = 0.1
"""The jumps at a threshold are spread between the thresholds of the fraction less this and the fraction and this."""


def ends(fraction: float, by: float = BAND) -> tuple[float, float]:
    """The two fractions between which a slope is taken."""
    return max(fraction - by, 0.005), min(fraction + by, 1.0)


class Gated(Masked):
    """A program with masks that gradients reach, and pass.

    gates: by group, the mask of a run as numbers, and what it masks; bands: the thresholds around each group's own.
    """

    def __init__(self, program: Program):
        super().__init__(program)
        self.bands: dict[Group, tuple[torch.Tensor, torch.Tensor]] = {}
        self.gates: dict[Group, tuple[torch.Tensor, torch.Tensor]] = {}
        self.group: Group | None = None

    def run_node(self, node: Node) -> Any:
        if node in self.masks:
            self.group = self.masks[node][1]
        return super().run_node(node)

    def _split(self, x: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert self.group is not None
        fixed, threshold = x.detach(), mask.threshold.to(x.device)
        sizes, (least, most) = fixed.abs(), (t.to(x.device).clamp_min(0) for t in self.bands[self.group])
        gate = (sizes > threshold).to(x.dtype).requires_grad_()
        self.gates[self.group] = gate, fixed
        jump = threshold.clamp_min(0) / (most - least).clamp_min(torch.finfo(torch.float32).tiny)
        slope = gate.detach() + torch.where((sizes > least) & (sizes <= most), jump, 0).to(x.dtype)
        kept = fixed * gate + slope * (x - fixed)
        return kept, None if mask.down is None else (x - kept) @ mask.down.to(x).t()


class Slopes:
    """The loss of a program with masks on calls, and what each group's loss falls by for each channel's share."""

    def __init__(
        self,
        program: Program,
        found: Mapping[Group, Sample],
        measure: Criterion,
        data: Sequence[Sequence[Any]],
        before: Sequence[Any],
    ):
        self.found, self.measure, self.data, self.before = found, measure, data, before
        self.trial = Gated(program)

    def __call__(self, choices: Choices, masks: Mapping[Group, Mask]) -> tuple[float, dict[Group, float]]:
        """The mean loss, and −∂loss/∂fraction by group."""
        self.trial.set(masks)
        self.trial.bands = {
            group: (self.found[group].threshold(high), self.found[group].threshold(low))
            for group, (low, high) in ((g, ends(choice.fraction, JUMPS)) for g, choice in choices.items())
        }
        total, slopes = 0.0, dict.fromkeys(choices, 0.0)
        for flat, before in zip(self.data, self.before, strict=True):
            self.trial.gates.clear()
            with torch.enable_grad():
                loss = self.measure(flat, before, self.trial(flat))
                gates = [gate for gate, _ in self.trial.gates.values()]
                gradients = torch.autograd.grad(loss, gates, allow_unused=True)
            total += float(loss.detach())
            for (group, (_, x)), gradient in zip(self.trial.gates.items(), gradients, strict=True):
                if gradient is None:
                    continue
                low, high = ends(choices[group].fraction)
                sizes, sample = x.abs(), self.found[group]
                least, most = (sample.threshold(f).to(x.device) for f in (high, low))
                band = (sizes > least) & (sizes <= most)
                slopes[group] -= float(gradient[band].sum()) / (high - low)
        self.trial.gates.clear()
        count = len(self.data)
        return total / count, {group: slope / count for group, slope in slopes.items()}
