"""fuseline::rotary: rotary position embedding on halves (Su et al., 2021)."""

from __future__ import annotations

import torch

from ._define import Kind, op


@op("rotary(Tensor x, Tensor cos, Tensor sin) -> Tensor", kind=Kind.ROW)
def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x·cos + [−x₂, x₁]·sin, where x = [x₁, x₂] along the last dimension.

    x: [..., d], d even; cos, sin: broadcastable to x, each half usually repeated. The result has the shape of the
    broadcast and the promoted dtype.
    """
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


rotary.lowers_to("codegen/emitter.py")
