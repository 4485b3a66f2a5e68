"""What takes the place of a weight, or of a value of the run: its codes, and what they stand for."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import Node

from ..compiler import ops
from ..compiler.expressions import Expression, Output, Pack, Planned
from ..compiler.plan import SitePlan
from ..compiler.rewriter import Builder
from ..compiler.schemes import KERNELS, Scheme

aten = torch.ops.aten


def round_trip(new: Builder, x: Node, scheme: Scheme) -> Node:
    """x [..., n] as its codes stand for it. Codes take a byte each, however many bits they have."""
    if new.trains:
        return new(ops.round_through, x, str(scheme), False)
    channels, dtype = int(x.meta["val"].shape[-1]), x.meta["val"].dtype
    group = scheme.group_of(channels)
    if not scheme.of.affine or scheme.rows != 1:
        made = new(ops.encode, x, scheme.format, group if scheme.rows else 0)
        codes, scale = (new(operator.getitem, made, i) for i in range(2))
        return new(ops.decode, codes, scale, None, None, scheme.format, group, False, dtype)
    made = new(ops.quantize if scheme.symmetric else ops.quantize_affine, x, scheme.bits, group)
    parts = [new(operator.getitem, made, i) for i in range(2 if scheme.symmetric else 3)]
    return new(ops.dequantize, *parts, *([None] if scheme.symmetric else []), 8, group, dtype)


def round_trip_at(new: Builder, x: Node, scheme: Scheme, decision: SitePlan) -> Node:
    """The same by a range that a plan holds: `input_scale` [1], `input_zero` [1] where the scheme has a zero point, and
    `input_shift` [n] where channels are multiplied by powers of two before."""
    value, device = x.meta["val"], str(x.meta["val"].device)
    held = {name: Planned.of(tensor, device) for name, tensor in decision.tensors.items() if name.startswith("input_")}
    if "input_shift" in held:
        shift = new.weight(Planned.of(decision.tensors["input_shift"].to(value.dtype), device))
        x = new(aten.mul.Tensor, x, shift)
    scale = new.weight(held["input_scale"])
    zero = new.weight(held["input_zero"]) if "input_zero" in held else None
    codes = new(ops.encode_at, x, scale, zero, scheme.format)
    return new(ops.decode, codes, scale, zero, None, scheme.format, int(value.shape[-1]), False, value.dtype)


def rounded_weight(
    new: Builder,
    quantized: Expression,
    scheme: Scheme,
    channels: int,
    dtype: torch.dtype,
    rows: Callable[[Node], Node] = lambda part: part,
) -> Node:
    """A weight [out, channels] as its packed codes stand for it, in `dtype`.

    quantized: the expression whose outputs are its codes and scales, as `Quantize` names them; rows: what is taken of
    the codes, scales and zero points, each of which has the weight's rows.
    """
    made = {name: Output(quantized, name) for name in scheme.outputs}
    parts = {name: new.weight(Pack(part, scheme) if name == "codes" else part) for name, part in made.items()}
    outer = parts.pop("outer", None)
    codes, scale, *zeros = map(rows, parts.values())
    zero = zeros[0] if zeros else None
    group = scheme.group_of(channels)
    if scheme.format in KERNELS:
        return new(ops.dequantize, codes, scale, zero, scheme.bits, group, dtype)
    return new(ops.decode, codes, scale, zero, outer, scheme.format, group, True, dtype)
