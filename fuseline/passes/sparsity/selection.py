"""Whether a candidate of a search is better than what costs no search, on calls that the search did not see.

A search fits what it is judged on: of many candidates that differ by less than the noise, the first is the luckiest. So
the closed form is kept unless another one is better beyond noise: the mean over unseen calls of ln(loss / its loss)
lies below 0 by more than Student's one-sided margin, at a level that is divided by the number of candidates which are
compared (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

LEVEL = 0.05
"""The chance that some candidate is taken though none is better."""

T = TypeVar("T")


@dataclass(frozen=True)
class Gain:
    """ratio: the mean of ln(loss / loss of the one compared with); margin: what it has to lie below 0 by."""

    ratio: float
    margin: float

    @property
    def is_one(self) -> bool:
        return self.ratio < -self.margin


def parted(items: Sequence[T], count: int) -> tuple[list[T], list[T]]:
    """`count` of the items, spread evenly over all, and the others; both in order."""
    count = min(count, len(items))
    taken = {i * len(items) // count for i in range(count)}
    return [x for i, x in enumerate(items) if i in taken], [x for i, x in enumerate(items) if i not in taken]


def gain(losses: Sequence[float], base: Sequence[float], compared: int) -> Gain:
    """What a candidate gains over another, call by call; compared: how many candidates are held against that one."""
    ratios = [math.log(max(a, 1e-30) / max(b, 1e-30)) for a, b in zip(losses, base, strict=True)]
    if len(ratios) < 2:
        return Gain(fmean(ratios) if ratios else 0.0, math.inf)
    return Gain(fmean(ratios), quantile(1 - LEVEL / compared, len(ratios) - 1) * stdev(ratios) / math.sqrt(len(ratios)))


def quantile(share: float, freedom: int) -> float:
    """Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))
