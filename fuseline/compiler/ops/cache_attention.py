"""fuseline::cache_attention: attention over a cache of codes, without expanding it.

Sources: flash decoding (Dao et al., 2023); KIVI (Liu et al., 2024), attention over codes and a full-precision window.
"""

from __future__ import annotations

import torch

from ..cached import CacheScheme, Side
from ._define import Kind, op
from .attention import attention

SIDE = ("codes", "scale", "low", "mean", "recent")
"""What the cache has of keys, and of values: `k_codes`, … and `v_codes`, …"""

_TENSORS = ", ".join(f"Tensor{'?' * (p in ('low', 'mean'))} {side}_{p}" for side in "kv" for p in SIDE)


@op(
    f"cache_attention(Tensor q, {_TENSORS}, Tensor length, Tensor? mask, float scale, str kind, str keys, str values, "
    "int block, SymInt offset=0, SymInt window=0, float softcap=0.0) -> Tensor",
    kind=Kind.ANCHOR,
)
def cache_attention(
    q: torch.Tensor,
    k_codes: torch.Tensor,
    k_scale: torch.Tensor,
    k_low: torch.Tensor | None,
    k_mean: torch.Tensor | None,
    k_recent: torch.Tensor,
    v_codes: torch.Tensor,
    v_scale: torch.Tensor,
    v_low: torch.Tensor | None,
    v_mean: torch.Tensor | None,
    v_recent: torch.Tensor,
    length: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    kind: str,
    keys: str,
    values: str,
    block: int,
    offset: int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """q: [B, H, S, D] → [B, H, S, Dv]: `attention` over the first `length` tokens of a cache of capacity T.

    k_*, v_*: the cache's parts, coded by the schemes `keys` and `values` in blocks of `block` tokens: see
    `compiler/cached.py`. mask: broadcasts to [B, H, S, T]; what it says of tokens from `length` on is not asked for.
    kind, offset, window, softcap: as in `attention`.
    """
    k = Side(k_codes, k_scale, k_low, k_mean, k_recent, CacheScheme.parse(keys), block, False).read(length, q.dtype)
    v = Side(v_codes, v_scale, v_low, v_mean, v_recent, CacheScheme.parse(values), block, True).read(length, q.dtype)
    filled = torch.arange(k.shape[2], device=q.device) < length.reshape(())
    if mask is None:
        seen = filled.expand(1, 1, q.shape[2], -1)
    elif mask.dtype == torch.bool:
        seen = mask & filled
    else:
        seen = mask.masked_fill(~filled, float("-inf"))
    return attention(q, k, v, seen, scale, kind, offset, window, softcap)


@cache_attention.fake
def _(q, *rest, **options):
    return q.new_empty((*q.shape[:3], rest[9].shape[-1]))


cache_attention.lowers_to("codegen/templates/cached.py")
