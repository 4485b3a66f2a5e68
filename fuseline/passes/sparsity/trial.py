"""A program with masks at some groups of products, run as it stands: what candidates of a search are judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler.expressions import Expression
from ...compiler.program import Program
from ..rotation.learning.losses import Criterion
from ..rotation.learning.trial import Trial
from .groups import Group


@dataclass(frozen=True)
class Mask:
    """What a group does to its input: see `fuseline::sparse_linear`. ups: one a product, in the group's order."""

    threshold: torch.Tensor
    down: torch.Tensor | None = None
    ups: tuple[torch.Tensor, ...] = ()


class Masked(Trial):
    """Runs a program on flat arguments of one call, with a mask at each of these groups.

    dense: the share of the positions, the first ones, that stay dense (the protocol of R-Sparse's code; 0: all are
    sparse). Positions are the last dimension but one of a product's input.
    """

    def __init__(self, program: Program, masks: Mapping[Group, Mask] | None = None, dense: float = 0.0):
        super().__init__(program)
        self.dense = dense
        self.masks: dict[Node, tuple[Mask, Group, int]] = {}
        self.inputs: dict[Group, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self.set(masks or {})

    def set(self, masks: Mapping[Group, Mask]) -> None:
        """Other masks from here on; weights that were evaluated stay."""
        self.masks = {
            site.node: (mask, group, i) for group, mask in masks.items() for i, site in enumerate(group.sites)
        }

    def weight(self, expression: Expression) -> torch.Tensor:
        if expression not in self.constants:
            self.constants[expression] = expression.evaluate(self._parameter)
        return self.constants[expression]

    def run_node(self, node: Node) -> Any:
        if node not in self.masks:
            return super().run_node(node)
        mask, group, number = self.masks[node]
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        at = 1 if node.target is torch.ops.aten.addmm.default else 0
        if number == 0:
            self.inputs[group] = self._split(args[at], mask)
        kept, low = self.inputs[group]
        if node is group.sites[-1].node:
            del self.inputs[group]
        result = node.target(*args[:at], kept, *args[at + 1 :], **kwargs)  # type: ignore[operator]
        return result if low is None else result + low @ mask.ups[number].to(low)

    def _split(self, x: torch.Tensor, mask: Mask) -> tuple[torch.Tensor, torch.Tensor | None]:
        dropped = x.abs() <= mask.threshold.to(x.device)
        first = int(x.shape[-2] * self.dense) if x.dim() > 1 else 0
        if first:
            dropped[..., :first, :] = False
        kept = x.masked_fill(dropped, 0)
        return kept, None if mask.down is None else (x - kept) @ mask.down.to(x).t()


class Judge:
    """The mean loss of masks over calls, against the program as it was, whose results are computed once."""

    def __init__(self, program: Program, measure: Criterion, data: Sequence[Sequence[Any]]):
        self.measure, self.data, self.trial = measure, data, Masked(program)
        with torch.no_grad():
            self.before = [self.trial(flat) for flat in data]

    @torch.no_grad()
    def each(self, masks: Mapping[Group, Mask]) -> list[float]:
        """The loss on each call."""
        self.trial.set(masks)
        return [
            float(self.measure(flat, before, self.trial(flat)))
            for flat, before in zip(self.data, self.before, strict=True)
        ]

    def __call__(self, masks: Mapping[Group, Mask]) -> float:
        losses = self.each(masks)
        return sum(losses) / len(losses)
