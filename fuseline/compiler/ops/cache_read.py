"""fuseline::cache_read: the keys or values of a cache of codes, as numbers."""

from __future__ import annotations

import torch

from ..cached import CacheScheme, Side
from ._define import Kind, op


@op(
    "cache_read(Tensor codes, Tensor scale, Tensor? low, Tensor? mean, Tensor recent, Tensor length, str scheme, "
    "int block, bool values) -> Tensor",
    kind=Kind.OTHER,
)
def cache_read(
    codes: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor | None,
    mean: torch.Tensor | None,
    recent: torch.Tensor,
    length: torch.Tensor,
    scheme: str,
    block: int,
    values: bool,
) -> torch.Tensor:
    """[B, H, T, D] in the dtype of `recent`: the first `length` tokens as the cache of capacity T holds them.

    The rows from `length` on are zeros and stand for no token: who attends over all T has to hide them by a mask.
    Where that is an attention and nothing else, `fuse` reads the codes instead (`cache_attention`).
    """
    return Side(codes, scale, low, mean, recent, CacheScheme.parse(scheme), block, values).read(length)


@cache_read.fake
def _(codes, scale, low, mean, recent, length, scheme, block, values):
    capacity = codes.shape[2] * (block if values else 1)
    return recent.new_empty((*recent.shape[:2], capacity, recent.shape[3]))
