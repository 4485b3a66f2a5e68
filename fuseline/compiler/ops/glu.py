"""fuseline::glu: activation(gate)·up, the gated linear units SwiGLU, GEGLU and ReGLU (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from ._define import Kind, op

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


@op("glu(Tensor gate, Tensor up, str activation) -> Tensor", kind=Kind.POINTWISE)
def glu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """gate, up: the same shape; activation: a key of ACTIVATIONS. The result has their shape and promoted dtype."""
    return ACTIVATIONS[activation](gate) * up


glu.lowers_to("codegen/emitter.py")
