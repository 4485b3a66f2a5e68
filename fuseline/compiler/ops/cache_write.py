"""fuseline::cache_write: new keys or values into a cache of codes, in place.

Sources: see `compiler/cached.py`, which says how a cache lies in memory.
"""

from __future__ import annotations

import torch

from ..cached import CacheScheme, Side
from ._define import Kind, op


@op(
    "cache_write(Tensor(a!) codes, Tensor(b!) scale, Tensor(c!)? low, Tensor(d!)? mean, Tensor(e!) recent, Tensor x, "
    "Tensor length, str scheme, int block, bool values) -> ()",
    kind=Kind.OTHER,
)
def cache_write(
    codes: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor | None,
    mean: torch.Tensor | None,
    recent: torch.Tensor,
    x: torch.Tensor,
    length: torch.Tensor,
    scheme: str,
    block: int,
    values: bool,
) -> None:
    """x [B, H, S, D] goes behind the first `length` tokens (an integer tensor of one element) of the cache's keys, or
    of its `values`; blocks that are complete and behind the window are coded. See `compiler/cached.py`.

    Tokens beyond the capacity are kept in no block: what is then read of them is undefined.
    """
    Side(codes, scale, low, mean, recent, CacheScheme.parse(scheme), block, values).write(x, length)


@cache_write.fake
def _(codes, scale, low, mean, recent, x, length, scheme, block, values):
    return None


cache_write.lowers_to("codegen/templates/cached_update.py")
