"""Values that are rounded at run time: quantize, then dequantize."""

from __future__ import annotations

import operator

from torch.fx import Node

from ..compiler import ops
from ..compiler.rewriter import Builder
from ..compiler.schemes import Scheme


def round_trip(new: Builder, x: Node, scheme: Scheme) -> Node:
    """x [..., n] as its codes stand for it. Codes take a byte each, however many bits they have."""
    channels, dtype = int(x.meta["val"].shape[-1]), x.meta["val"].dtype
    group = scheme.group_of(channels)
    made = new(ops.quantize if scheme.symmetric else ops.quantize_affine, x, scheme.bits, group)
    parts = [new(operator.getitem, made, i) for i in range(2 if scheme.symmetric else 3)]
    return new(ops.dequantize, *parts, *([None] if scheme.symmetric else []), 8, group, dtype)
