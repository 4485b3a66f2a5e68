"""fuseline::rms_norm: x·rsqrt(mean(x²) + eps)·w over the last dimension (Zhang and Sennrich, 2019)."""

from __future__ import annotations

import torch

from ._define import Kind, op


@op(
    "rms_norm(Tensor x, Tensor? weight, float eps, bool unit_offset=False, ScalarType? accumulate=None, "
    "bool cast_first=True) -> Tensor",
    kind=Kind.ROW,
)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    unit_offset: bool = False,
    accumulate: torch.dtype | None = None,
    cast_first: bool = True,
) -> torch.Tensor:
    """x: [..., n]; weight: [n] or None; the result has x's shape.

    `unit_offset` multiplies by 1 + w. `accumulate` is the type of the statistics (None: x's own). `cast_first`
    casts back to x's type before the weight is applied; otherwise after.
    """
    h = x if accumulate is None else x.to(accumulate)
    h = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)
    if weight is None:
        return h.to(x.dtype)
    if cast_first:
        h = h.to(x.dtype)
        return h * (1.0 + weight) if unit_offset else h * weight
    scale = weight.to(h.dtype)
    return (h * (1.0 + scale) if unit_offset else h * scale).to(x.dtype)


rms_norm.lowers_to("codegen/emitter.py")
