"""fuseline::attention: scaled dot-product attention that knows its mask and its head grouping.

Source: Vaswani et al., 2017; grouped queries: Ainslie et al., 2023; soft-capping: Bello et al., 2016.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._define import Kind, op


@op(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale, str kind, SymInt offset=0, "
    "SymInt window=0, float softcap=0.0, float dropout=0.0) -> Tensor",
    kind=Kind.ANCHOR,
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    kind: str,
    offset: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    dropout: float = 0.0,
) -> torch.Tensor:
    """q: [B, H, S, D]; k, v: [B, H/g, T, D], query head h reads key head h // g; the result: [B, H, S, Dv].

    kind "full": every key; "causal": key j for query i when j <= i + offset; "sliding": also j > i + offset − window.
    `mask` (boolean, True where visible; or additive) comes on top and broadcasts to [B, H, S, T]. `softcap` c > 0
    replaces the scaled logits x by c·tanh(x / c) before masking.
    """
    grouped = bool(q.shape[1] != k.shape[1])
    if not softcap:
        plain_causal = kind == "causal" and mask is None and isinstance(offset, int) and offset == 0
        visible = None if plain_causal else visibility(q, k, mask, kind, offset, window)
        if grouped and q.is_cuda and not (visible is None and q.dtype.itemsize == 2 and q.shape[-1] <= 256):
            # Of PyTorch's fused kernels flash attention alone shares heads; the others would give way to one that
            # stores the weights [B, H, S, T].
            groups, grouped = q.shape[1] // k.shape[1], False
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return F.scaled_dot_product_attention(
            q, k, v, visible, dropout, is_causal=plain_causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    logits = softcap * torch.tanh((q @ k.transpose(-1, -2)) * scale / softcap)
    visible = visibility(q, k, mask, kind, offset, window)
    if visible is not None and visible.dtype == torch.bool:
        logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
    elif visible is not None:
        logits = logits + visible
    compute = torch.float32 if logits.dtype.itemsize < 4 else logits.dtype
    weights = F.dropout(torch.softmax(logits, -1, dtype=compute).to(q.dtype), dropout, dropout > 0)
    return weights @ v


def visibility(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, kind: str, offset: int, window: int
) -> torch.Tensor | None:
    """The mask that `kind`, `offset` and `window` stand for, joined with `mask`; None where all keys are visible."""
    if kind == "full":
        return mask
    i = torch.arange(q.shape[2], device=q.device)[:, None] + offset
    j = torch.arange(k.shape[2], device=q.device)[None, :]
    inside = j <= i
    if kind == "sliding":
        inside = inside & (j > i - window)
    if mask is None:
        return inside
    return inside & mask if mask.dtype == torch.bool else mask.masked_fill(~inside, float("-inf"))


@attention.fake
def _(q, k, v, mask, scale, kind, offset=0, window=0, softcap=0.0, dropout=0.0):
    # [B, H, S, Dv] stored as [B, S, H, Dv] is what fused kernels return; the naive twin's layout depends on the
    # backend that PyTorch picks, so users of the result must not rely on its strides.
    return q.new_empty((*q.shape[:3], v.shape[-1]))


attention.lowers_to("aten.scaled_dot_product_attention")
