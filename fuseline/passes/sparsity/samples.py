"""What each group reads on the calibration data: rows of its input, and the sizes that a threshold is a quantile of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.errors import UserError
from ...compiler.program import Program
from ...compiler.progress import steps
from ..calibrated.inputs import finite
from ..calibrated.stream import Stream
from .groups import Group

ROWS = 1024
"""Rows of a group's input that are kept, spread evenly over the calibration data."""

LEVELS = 1000
"""Steps of the table of quantiles."""

LEAST = 100
"""Sizes that have to lie on either side of a threshold, so that it is a quantile and not an accident."""


@dataclass(frozen=True)
class Sample:
    """x: [rows, n]; scale: what |x_j| is multiplied by before it is compared, [n], or None; sizes: quantiles of that,
    float32 [LEVELS + 1]; seen: rows of the calibration data."""

    x: torch.Tensor
    scale: torch.Tensor | None
    sizes: torch.Tensor
    seen: int

    def threshold(self, fraction: float) -> torch.Tensor:
        """What |x_j| is compared with where `fraction` of the channels is to be kept: float32, [1] or [n]."""
        place = (1 - fraction) * LEVELS
        low = min(int(place), LEVELS - 1)
        value = torch.lerp(self.sizes[low], self.sizes[low + 1], place - low).reshape(1)
        if fraction >= 1:
            value = torch.full_like(value, -1.0)  # zeros are kept, too
        return value if self.scale is None else value / self.scale

    def resolved(self, fraction: float) -> float:
        """The fraction that the data can tell: all channels, where too few sizes would lie below the threshold."""
        least = LEAST / (self.seen * self.x.shape[1])
        return 1.0 if 1 - fraction < least else max(fraction, least)

    def dropped(self, fraction: float) -> torch.Tensor:
        """Which of `x` a mask drops, [rows, n]."""
        return self.x.abs() <= self.threshold(fraction)


def samples(
    program: Program, groups: Sequence[Group], data: Sequence[Sequence[Any]], weighted: bool
) -> tuple[dict[Group, Sample], dict[Group, str]]:
    """A sample of what each group reads, and the groups whose input says nothing, with the reason.

    weighted: channels count by |x_j|·‖W_:,j‖, the norm over all products of the group (WINA, Chen et al., 2025).

    Raises:
        UserError: a value is infinite or no number; names the site and the batch.
    """
    found: dict[Group, Sample] = {}
    refused: dict[Group, str] = {}
    by_sites = {group.sites: group for group in groups}
    stops = Stream(program, data).stops([group.sites for group in groups])
    for stop in steps(stops, "reading activations", total=len(groups)):
        group = by_sites[stop.sites]
        x, seen = _rows(group, stop.x(), len(data))
        if float((x - x[:1]).abs().max()) == 0:
            refused[group] = (
                f"its input is the same at all {seen} rows of the calibration data: no quantile of it says what is "
                "small in others"
            )
            continue
        scale = None
        if weighted:
            norms = sum(stop.weight(site).float().square().sum(0) for site in group.sites)
            assert isinstance(norms, torch.Tensor)
            scale = norms.sqrt().clamp_min(torch.finfo(torch.float32).tiny).to(x.device)
        sizes = x.abs() if scale is None else x.abs() * scale
        found[group] = Sample(x, scale, _quantiles(sizes), seen)
    return found, refused


def check(groups: Mapping[Group, Sample], fraction: float) -> None:
    """Refuses thresholds that keep `fraction` where too few of the calibration data's sizes lie beyond them.

    Raises:
        UserError: names the site, and says how much data would do.
    """
    for group, sample in groups.items():
        beyond = min(fraction, 1 - fraction)
        if beyond > 0 and sample.seen * group.n * beyond < LEAST:
            rows = int(LEAST / (group.n * beyond)) + 1
            raise UserError(
                f"{sample.seen} rows of calibration data are too few for a threshold that keeps {fraction:.1%}",
                [f"at {group.name}, of {group.n} channels: {LEAST} sizes have to lie on either side of it"],
                f"give at least {rows} tokens",
            )


def _rows(group: Group, batches: Any, count: int) -> tuple[torch.Tensor, int]:
    kept, seen = [], 0
    for x in finite(batches, group.name):
        rows = x.reshape(-1, x.shape[-1])
        seen += len(rows)
        take = min(len(rows), -(-ROWS // count))
        kept.append(rows[torch.arange(take) * len(rows) // max(1, take)].float())
    return torch.cat(kept), seen


def _quantiles(sizes: torch.Tensor) -> torch.Tensor:
    """All at once from one sort; between two values as `torch.quantile` has it."""
    ordered = sizes.flatten().sort().values
    places = torch.linspace(0, len(ordered) - 1, LEVELS + 1, dtype=torch.float64)
    low = places.long().clamp_max(len(ordered) - 2) if len(ordered) > 1 else torch.zeros_like(places).long()
    share = (places - low).float().to(ordered.device)
    return torch.lerp(ordered[low], ordered[(low + 1).clamp_max(len(ordered) - 1)], share)
