"""MiLo: experts in few bits with low ranks that make up for what rounding loses, as many as each expert needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.compensated import Compensated
from ...compiler.expressions import Output, Quantize
from ...compiler.rewriter import Builder
from ...compiler.schemes import Scheme
from ..quantize_values import rounded_weight
from .layers import Layer, Stack
from .options import Ranks

aten = torch.ops.aten


def kurtosis(matrices: Sequence[torch.Tensor]) -> float:
    """Excess kurtosis of all elements of an expert's matrices: 0 for normally distributed ones."""
    count = sum(m.numel() for m in matrices)
    mean = sum(float(m.double().sum()) for m in matrices) / count
    second, fourth = (sum(float((m.double() - mean).pow(p).sum()) for m in matrices) / count for p in (2, 4))
    return fourth / second**2 - 3 if second else 0.0


def ranks(policy: Ranks, average: int, kurtoses: Sequence[float], frequencies: Sequence[float], most: int) -> list[int]:
    """The rank of each expert, `average` of them on average: none above `most`, all alike, or in proportion to
    2^kurtosis, as MiLo's table of ranks grows, or to how often an expert is chosen.

    What the limit takes from some goes to the others.
    """
    count = len(kurtoses)
    if policy is Ranks.UNIFORM:
        return [min(average, most)] * count
    if policy is Ranks.KURTOSIS:
        top = max(kurtoses)
        parts = [math.exp2(k - top) for k in kurtoses]
    else:
        parts = [max(f, 1e-6) for f in frequencies]
    found: dict[int, float] = {}
    while len(found) < count:
        rest = [e for e in range(count) if e not in found]
        left, total = average * count - sum(found.values()), sum(parts[e] for e in rest)
        share = {e: left * parts[e] / total for e in rest}
        full = {e: float(most) for e in rest if share[e] >= most}
        found |= full or share
    whole = [int(found[e]) for e in range(count)]
    order = sorted(range(count), key=lambda e: whole[e] - found[e])
    for e in order[: round(sum(found.values())) - sum(whole)]:
        whole[e] += 1
    return whole


def compensated(
    new: Builder, layer: Layer, stack: Stack, scheme: Scheme, factors: Scheme | None, own: Sequence[int], rounds: int
) -> Node:
    """A stack [E, m, n] as codes and low ranks stand for it; factors: what these are rounded to, None to leave them."""
    name = "gate_up" if stack is layer.gate_up else "down"
    e, m, n = (int(size) for size in layer.given[name].meta["val"].shape)
    dtype = layer.given[name].meta["val"].dtype
    made = Compensated(stack.weight, scheme, tuple(own), rounds, stack.turned)
    base = new(aten.view.default, rounded_weight(new, made, scheme, n, dtype), [e, m, n])
    if not sum(own):
        return base
    parts = [_factor(new, Output(made, part), size, factors, dtype) for part, size in (("up", m), ("down", n))]
    return new(ops.lowrank_add, base, *parts, list(own))


def _factor(new: Builder, part: Output, size: int, scheme: Scheme | None, dtype: torch.dtype) -> Node:
    if scheme is None or scheme.refuse(size):
        return new.weight(part)
    return rounded_weight(new, Quantize(part, scheme), scheme, size, dtype)
