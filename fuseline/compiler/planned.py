"""Tensors that a plan holds, kept by their contents, so that weight expressions can name them.

A learned matrix is megabytes: an expression holds its digest, and the tensor is found here while some plan that was
made or loaded in this process has it.
"""

from __future__ import annotations

import hashlib

import torch

from .errors import UserError

SAME = 1e-4
"""What part of its norm a weight may differ by and count as the same."""

_KEPT: dict[str, torch.Tensor] = {}


def keep(tensor: torch.Tensor) -> str:
    """Keeps a tensor, on the CPU; returns its digest."""
    held = tensor.detach().cpu().contiguous()
    digest = digest_of(held)
    _KEPT.setdefault(digest, held)
    return digest


def digest_of(tensor: torch.Tensor) -> str:
    """What tells a tensor from others of another dtype, of other sizes or with other values."""
    held = tensor.detach().cpu().contiguous()
    contents = held.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{held.dtype} {tuple(held.shape)} ".encode() + contents).hexdigest()[:20]


def kept(digest: str) -> torch.Tensor:
    """The tensor with this digest, on the CPU.

    Raises:
        UserError: no plan that was made or loaded here has it.
    """
    if digest not in _KEPT:
        raise UserError(
            f"a weight is made with tensor {digest} of a plan that is not loaded",
            remedy="load the plan first: fuseline.compiler.plan.Plan.load(PATH)",
        )
    return _KEPT[digest]


def probe(weight: torch.Tensor) -> tuple[float, float]:
    """Two numbers that tell a weight from others, and change as little as its values do: ‖w‖ and Σ w·cos(n mod 2²⁰)."""
    pieces = weight.detach().reshape(-1).split(1 << 20)
    waves = torch.arange(len(pieces[0]), dtype=torch.float64, device=weight.device).cos_()
    sums = [(piece.double().square().sum(), torch.dot(piece.double(), waves[: len(piece)])) for piece in pieces]
    return sum(float(square) for square, _ in sums) ** 0.5, sum(float(along) for _, along in sums)


def same_weight(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two probes are one weight's, folded on machines that round differently."""
    return all(abs(a - b) <= SAME * max(one[0], other[0]) for a, b in zip(one, other, strict=True))
