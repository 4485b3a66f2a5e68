"""Tensors that a plan holds, kept by their contents, so that weight expressions can name them.

A learned matrix is megabytes: an expression holds its digest, and the tensor is found here while some plan that was
made or loaded in this process has it.
"""

from __future__ import annotations

import hashlib

import torch

from .errors import UserError

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
