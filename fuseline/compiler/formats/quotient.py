"""A division whose result is the same on every device."""

from __future__ import annotations

import torch


def quotient(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by rounded to nearest, in x's dtype.

    `x / 127.0` is that on a CPU only: PyTorch multiplies by the reciprocal on CUDA, which is off in the last bit, and a
    scale that is off puts codes at a half-way point elsewhere.
    """
    return x / x.new_full((), by)
