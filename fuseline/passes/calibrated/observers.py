"""Ranges of values of the run, for `activations=…:static`: one scale, and zero point, for all calls.

    largest    from the least to the largest value of all batches
    mean       the running mean of each batch's least and largest value, a hundredth of a new batch a time
    p99.9      99.9% of the values lie within: of |x| where there is no zero point, else of both ends

Sources: largest and mean are the min-max and moving-average observers of Jacob et al. (2018, section 3.1); percentiles
are those of Wu et al. (2020, section 5). A percentile is read from a histogram of 2¹⁶ steps that doubles its reach as
it has to, so that no value is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ...compiler.errors import UserError, nearest
from ...compiler.schemes import Scheme

MOMENTUM = 0.01
STEPS = 1 << 16


@dataclass(frozen=True)
class Observer:
    """kind: largest, mean or percentile; share: of the values that lie within the range."""

    kind: str
    share: float = 1.0

    @staticmethod
    def parse(text: str) -> Observer:
        """Reads `largest`, `mean` or `pSHARE` in percent.

        Raises:
            UserError: it is none of these, or a share that is not between 50 and 100.
        """
        if text in ("largest", "mean"):
            return Observer(text)
        found = re.fullmatch(r"p(\d+(?:\.\d+)?)", text)
        if found is None or not 50 < float(found[1]) <= 100:
            raise UserError(f"observe cannot be '{text}'{nearest(text, ('largest', 'mean', 'p99.9'))}")
        return Observer("percentile", float(found[1]) / 100)

    def range(self, batches: Iterable[torch.Tensor], symmetric: bool) -> tuple[float, float]:
        """The least and the largest value to be represented, with 0 between them."""
        low, high, counts = 0.0, 0.0, Histogram()
        for number, x in enumerate(batches):
            x = x.abs() if symmetric else x
            least, most = float(x.min()), float(x.max())
            if self.kind == "mean" and number:
                low, high = low + MOMENTUM * (least - low), high + MOMENTUM * (most - high)
            else:
                low, high = (least, most) if not number else (min(low, least), max(high, most))
            if self.kind == "percentile":
                counts.add(x)
        if self.kind == "percentile":
            low, high = counts.within(self.share, symmetric)
        return (-high, high) if symmetric else (min(low, 0.0), max(high, 0.0))


@dataclass
class Histogram:
    """How many values lie in each of `STEPS` equal steps from −reach to reach."""

    reach: float = 0.0
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(STEPS, dtype=torch.float64))

    def add(self, x: torch.Tensor) -> None:
        values = x.detach().reshape(-1).to(torch.float32)
        most = float(values.abs().max())
        if self.reach == 0:
            self.reach = most
        while most > self.reach:
            pairs = self.counts.view(-1, 2).sum(1)
            quarter = torch.zeros(STEPS // 4, dtype=torch.float64)
            self.counts, self.reach = torch.cat((quarter, pairs, quarter)), 2 * self.reach
        if self.reach > 0:
            self.counts += torch.histc(values, STEPS, -self.reach, self.reach).cpu().double()

    def within(self, share: float, one_sided: bool) -> tuple[float, float]:
        """Ends between which this share of all values lies; one_sided: all beyond them lie above."""
        total, step = float(self.counts.sum()), 2 * self.reach / STEPS
        if total == 0:
            return 0.0, 0.0
        beyond = (1 - share) * total / (1 if one_sided else 2)
        above = self.counts.flip(0).cumsum(0)
        below = self.counts.cumsum(0)
        high = self.reach - step * int((above <= beyond).sum())
        low = -self.reach + step * int((below <= beyond).sum())
        return (-high if one_sided else low), high


def scale_of(low: float, high: float, scheme: Scheme) -> dict[str, torch.Tensor]:
    """`input_scale` [1] float32 and, where the scheme has one, `input_zero` [1] uint8, for values from low to high."""
    group = torch.tensor([[low, high]], dtype=torch.float32)
    _, grid = scheme.grid(group)
    scale, zero = grid.of(group)
    parts = {"input_scale": scale.reshape(1).float()}
    return parts if scheme.symmetric else parts | {"input_zero": zero.reshape(1).to(torch.uint8)}
