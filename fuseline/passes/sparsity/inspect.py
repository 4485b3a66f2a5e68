"""How the inputs of a program's products are distributed, and what thresholds would keep of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...compiler.program import Program
from ...compiler.sites import sites
from .groups import groups
from .options import Score
from .samples import LEVELS, samples


@dataclass(frozen=True)
class Seen:
    """groups: of each, its site, kind, channels, thresholds, energy, kurtosis, histogram; refused: site → reason."""

    groups: list[dict[str, Any]]
    refused: dict[str, str]

    def reasons(self) -> list[tuple[int, str]]:
        """How many products each reason leaves out, the most frequent first."""
        return [(count, reason) for reason, count in Counter(self.refused.values()).most_common()]


def inspect(program: Program, data: Sequence[Sequence[Any]], score: Score, kept: Sequence[float], bins: int) -> Seen:
    """Reads what each group of products reads on the data.

    Args:
        kept: shares of the channels. For each there is a threshold (with norm-weighted the mean over channels) and the
            energy, the share of Σx² that the kept channels hold.
        bins: of the histogram of |x|, from 0 to its 99.9% quantile; what is beyond counts in the last.
    """
    names = sites(program.graph)
    found, refused = groups(program, names, (), ())
    read, dull = samples(program, found, data, score is Score.NORM_WEIGHTED)
    told = []
    for group, sample in read.items():
        sizes, square = sample.x.abs(), sample.x.double().square()
        top = float(sizes.flatten().kthvalue(max(1, int(0.999 * sizes.numel()))).values)
        counts = torch.histc(sizes.clamp_max(top), bins, 0.0, top or 1.0) / sizes.numel()
        energy = [1 - float(square[sample.dropped(share)].sum() / square.sum()) for share in kept]
        told.append(
            {
                "site": group.name,
                "kind": group.kind,
                "block": group.block,
                "sites": list(group.names),
                "channels": group.n,
                "columns": group.m,
                "rows": sample.seen,
                "keep": list(kept),
                "thresholds": [float(sample.threshold(share).mean()) for share in kept],
                "energy": energy,
                "kurtosis": float(square.square().mean() / square.mean().square()),
                "quantiles": sample.sizes[:: LEVELS // 20].tolist(),
                "histogram": counts.tolist(),
                "histogram_end": top,
            }
        )
    reasons = {names[site.node]: reason for site, reason in refused.items()}
    return Seen(told, reasons | {name: reason for group, reason in dull.items() for name in group.names})
