"""fuseline::layer_norm: (x − mean)·rsqrt(var + eps)·w + b over the last dimension (Ba et al., 2016)."""

from __future__ import annotations

import torch

from ._define import Kind, op


@op("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor", kind=Kind.ROW)
def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x: [..., n]; weight, bias: [n] or None; the variance is the biased one. The result has x's shape and dtype."""
    return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


layer_norm.lowers_to("codegen/emitter.py")
