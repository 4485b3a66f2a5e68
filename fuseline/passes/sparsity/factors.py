"""The low-rank branch: W ≈ up·down on what a mask drops, with the products of a group sharing `down`.

By the weights alone: the singular value decomposition of the group's matrices, one above the other (R-Sparse). By data:
the same of W·L, where L·Lᵀ = E[t·tᵀ] is the second moment of what is dropped: of all factors of that rank these have
the least E‖(W − up·down)·t‖² (SVD-LLM, Wang et al., 2024, does so for whole activations). Components are in falling
order, so the first r of them are the factors of rank r.
"""

from __future__ import annotations

import enum
import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ...compiler.planned import digest_of
from ...compiler.results import Results

NOMINAL = 0.5
"""The fraction of channels that is kept where what is dropped is measured."""

LARGE = 2048
"""From this least dimension on the decomposition is randomised (Halko et al., 2011), with four iterations."""

RIDGE = 1e-2
"""The share of the mean diagonal that is added to the second moment: few rows say little of some directions."""

HELD = 512
"""Decompositions that are remembered."""


class Factors(enum.Enum):
    """What the low-rank branch is fitted to."""

    DATA = "data"  # what the mask drops on the calibration data
    WEIGHTS = "weights"  # the weights alone, as published


@dataclass(frozen=True)
class LowRank:
    """down: float32 [r, n]; up: float32 [r, m]."""

    down: torch.Tensor
    up: torch.Tensor

    def first(self, rank: int) -> LowRank:
        """The factors of a lower rank."""
        return LowRank(self.down[:rank], self.up[:rank])


_KNOWN: OrderedDict[tuple[str, ...], LowRank] = OrderedDict()


def low_rank(
    weight: torch.Tensor, dropped: torch.Tensor | None, rank: int, results: Results | None = None, name: str = "matrix"
) -> LowRank:
    """The factors of a matrix [m, n]; dropped: rows [k, n] that it will be multiplied with, or None.

    Decompositions are remembered by the contents of both: the same weights are not decomposed twice in a process, nor
    in another one that has the same `results`, where they go by `name`.
    """
    device = weight.device
    fields = {
        "weight": digest_of(weight),
        "dropped": "" if dropped is None else digest_of(dropped),
        "rank": rank,
        "code": _code(),
        "device": device.type,
        "torch": torch.__version__,
    }
    key = tuple(map(str, fields.values()))
    if key not in _KNOWN:
        kept = None if results is None else results.get(name, fields)
        if kept is not None:
            _KNOWN[key] = LowRank(kept["down"].to(device), kept["up"].to(device))
        else:
            made = _KNOWN[key] = _decompose(weight.float(), dropped, rank)
            if results is not None:
                results.put(name, fields, {"down": made.down, "up": made.up})
        if len(_KNOWN) > HELD:
            _KNOWN.popitem(last=False)
    _KNOWN.move_to_end(key)
    return _KNOWN[key]


@cache
def _code() -> str:
    """A digest of this file: what lies on disk may be another release's."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def _decompose(weight: torch.Tensor, dropped: torch.Tensor | None, rank: int) -> LowRank:
    if dropped is None or not bool(dropped.any()):
        u, s, v = _svd(weight, rank)
        return LowRank(v.contiguous(), (u * s).t().contiguous())
    moment = (dropped.t() @ dropped).double() / len(dropped)
    moment.diagonal().add_(RIDGE * moment.diagonal().mean())
    root = torch.linalg.cholesky(moment)
    u, s, v = _svd((weight.double() @ root).float(), rank)
    down = torch.linalg.solve_triangular(root, v.double(), upper=False, left=False)
    return LowRank(down.float().contiguous(), (u * s).t().contiguous())


def _svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """u [m, r], s [r], vᵀ [r, n]."""
    if min(matrix.shape) < LARGE:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    with torch.random.fork_rng(devices=[matrix.device] if matrix.device.type == "cuda" else []):
        torch.manual_seed(0)  # the same factors in every run
        u, s, v = torch.svd_lowrank(matrix, min(rank + 16, *matrix.shape), niter=4)
    return u[:, :rank], s[:rank], v[:, :rank].t()
