"""The ops behind `nn.TransformerEncoderLayer` and `nn.MultiheadAttention` in evaluation, written out.

In evaluation without gradients PyTorch runs either of these modules as one op, weights and all, and Dynamo captures
that op. Written out in the ops that the modules run in training, passes see the linears, norms and attention inside.
The signatures are those of `aten/src/ATen/native/transformers` (torch 2.11 to 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def encoder_layer(
    src: Tensor, embed_dim: int, num_heads: int, qkv_weight: Tensor, qkv_bias: Tensor, proj_weight: Tensor,
    proj_bias: Tensor, use_gelu: bool, norm_first: bool, eps: float, norm_weight_1: Tensor, norm_bias_1: Tensor,
    norm_weight_2: Tensor, norm_bias_2: Tensor, ffn_weight_1: Tensor, ffn_bias_1: Tensor, ffn_weight_2: Tensor,
    ffn_bias_2: Tensor, mask: Tensor | None = None, mask_type: int | None = None,
) -> Tensor:  # fmt: skip
    """src [B, T, C] → [B, T, C]; the mask as `multi_head_attention` takes it."""
    norm_1 = lambda x: F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)
    norm_2 = lambda x: F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)
    weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
    attend = lambda x: multi_head_attention(x, x, x, embed_dim, num_heads, *weights, mask, False, True, mask_type)[0]
    activation = F.gelu if use_gelu else F.relu
    feed = lambda x: F.linear(activation(F.linear(x, ffn_weight_1, ffn_bias_1)), ffn_weight_2, ffn_bias_2)
    if norm_first:
        x = src + attend(norm_1(src))
        return x + feed(norm_2(x))
    x = norm_1(src + attend(src))
    return norm_2(x + feed(x))


def multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim: int, num_head: int, qkv_weight: Tensor, qkv_bias: Tensor,
    proj_weight: Tensor, proj_bias: Tensor, mask: Tensor | None = None, need_weights: bool = True,
    average_attn_weights: bool = True, mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of [B, T, C] to itself, and no weights.

    mask, as a boolean true where a position is hidden: [T, T] (type 0), [B, T] of keys (1), [B, heads, T, T] (2).
    """
    split = lambda x: x.unflatten(-1, (num_head, -1)).transpose(1, 2)
    q, k, v = map(split, F.linear(query, qkv_weight, qkv_bias).chunk(3, -1))
    visible = None
    if mask is not None:
        visible = mask.to(torch.bool).logical_not()
        visible = visible[:, None, None, :] if mask_type == 1 else visible
    mixed = F.scaled_dot_product_attention(q, k, v, visible)
    return F.linear(mixed.transpose(1, 2).flatten(-2), proj_weight, proj_bias), None


def written_out(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], Any] | None:
    """How to run a call of one of these ops in plain ATen; None for any other, and for a use that is not covered."""
    name = getattr(target, "__name__", "").split(".")[0]
    if name == "_transformer_encoder_layer_fwd":
        return lambda: encoder_layer(*args, **kwargs)
    if name == "_native_multi_head_attention":
        needs_weights = kwargs.get("need_weights", args[10] if len(args) > 10 else True)
        itself = len(args) > 2 and args[0] is args[1] is args[2]
        if itself and not needs_weights:
            return lambda: multi_head_attention(*args, **kwargs)
    return None
