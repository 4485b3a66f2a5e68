"""Rounding to nearest, written out once more: no code of ours."""

from __future__ import annotations

import torch


def symmetric(group: torch.Tensor, bits: int) -> torch.Tensor:
    """A group [n], float32, as symmetric integers stand for it, float64, in the range that has less Σ|error|^2.5.

    In the wider step's range the largest lies between two codes, and which is nearer, float32's quotient says.
    """
    top, best = 2 ** (bits - 1) - 1, None
    for part in (1.0, top / (top + 0.5)):
        scale = group.abs().max() * torch.tensor(part) / top
        back = (group / scale).round().clamp(-top - 1, top).double() * scale.double()
        cost = (back - group.double()).abs().pow(2.5).sum()
        if best is None or cost < best[0]:
            best = cost, back
    return best[1]
