"""fuseline::embedding_gradient: the gradient of an embedding's table, without a second table in float32.

PyTorch's decomposition sums 16-bit gradients in a float32 table of the same size and rounds it at the end: at a
vocabulary of 128256 and a width of 4096 that is 2.1 GB beside the gradient's own 1.05 GB, at the end of the backward,
where all gradients are there. Here some columns are summed at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from ._define import op
from .linear_cross_entropy import accumulates_in

AT_A_TIME = 1 << 27
"""Bytes of the float32 sums."""


def columns_at_a_time(rows: Any, width: Any) -> Any:
    """How many columns of a table [rows, width] are summed at a time."""
    if not isinstance(rows, int) or not isinstance(width, int):
        return width
    return min(width, max(AT_A_TIME // (4 * max(rows, 1)) // 64, 1) * 64)


@op("embedding_gradient(Tensor grad, Tensor indices, SymInt rows, SymInt padding_idx) -> Tensor", whole=True)
def embedding_gradient(grad: torch.Tensor, indices: torch.Tensor, rows: int, padding_idx: int) -> torch.Tensor:
    """grad: [..., n]; indices: [...] int64 or int32, below `rows` → [rows, n] of grad's type.

    Sums of 16-bit types are in float32, as in PyTorch's decomposition; row `padding_idx` is zero, unless that is
    negative.
    """
    n = grad.shape[-1]
    grad, indices = grad.reshape(-1, n), indices.reshape(-1)
    found = grad.new_empty((rows, n))
    step = columns_at_a_time(rows, n)
    for first in range(0, n, step):
        part = grad[:, first : first + step].to(accumulates_in(grad.dtype))
        sums = part.new_zeros((rows, part.shape[1])).index_add_(0, indices, part)
        found[:, first : first + step] = sums
    if padding_idx >= 0:
        found[padding_idx] = 0
    return found


@embedding_gradient.fake
def _(grad: torch.Tensor, indices: torch.Tensor, rows: int, padding_idx: int) -> torch.Tensor:
    return grad.new_empty((rows, grad.shape[-1]))


@embedding_gradient.workspace
def _(grad: torch.Tensor, indices: torch.Tensor, rows: int, padding_idx: int) -> Any:
    """The sums of some columns, and those columns of the gradient."""
    return 4 * columns_at_a_time(rows, grad.shape[-1]) * (rows + indices.numel())
