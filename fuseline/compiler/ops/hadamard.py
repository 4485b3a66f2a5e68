"""fuseline::hadamard: x·(C ⊗ H_2 ⊗ … ⊗ H_2)/√n along the last dimension, a rotation in n·log n steps.

C is an operand, a weight of the graph: `expressions.HadamardCore(order, device)` for the sizes in `hadamard.factor`,
or any orthogonal matrix. A randomised rotation is x·signs before it, with `expressions.Signs`.

    split = factor(n)
    dense = new.weight(HadamardCore(split.order, device)) if split.order > 1 else None
    y = new(ops.hadamard, x, dense, n)
"""

from __future__ import annotations

import torch

from ..errors import FuselineError
from ._define import Kind, op


@op("hadamard(Tensor x, Tensor? core=None, int block=0) -> Tensor", kind=Kind.ROW)
def hadamard(x: torch.Tensor, core: torch.Tensor | None = None, block: int = 0) -> torch.Tensor:
    """x: [..., n]; core: [K, K], int8 signs (divided by √K) or orthogonal, absent for K = 1; the result is like x.

    block: rotates each run of `block` channels by itself; 0: the whole dimension. A block is K times a power of two.
    Computed in float32 for 16-bit inputs, otherwise in x's type: the core between channels that lie 2^m apart, then
    Walsh-Hadamard butterflies. Source: Fino and Algazi, 1976.
    """
    order, size = _split(x, core, block)
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x.to(compute).reshape(*x.shape[:-1], x.shape[-1] // (order * size), order, size)
    scale = float(size)
    if core is not None:
        h = core.to(compute).t() @ h
        scale *= order if core.dtype == torch.int8 else 1
    distance = 1
    while distance < size:
        a, b = h.unflatten(-1, (size // (2 * distance), 2, distance)).unbind(-2)
        h = torch.stack((a + b, a - b), -2).flatten(-3)
        distance *= 2
    return (h * scale**-0.5).to(x.dtype).reshape(x.shape)


@hadamard.fake
def _(x, core=None, block=0):
    _split(x, core, block)
    return x.new_empty(x.shape)


def _split(x: torch.Tensor, core: torch.Tensor | None, block: int) -> tuple[int, int]:
    """The order of the core, and the power of two that stands beside it."""
    channels = x.shape[-1]
    n, order = block or channels, 1 if core is None else core.shape[0]
    if n < 1 or channels % n:
        raise FuselineError(f"hadamard: blocks of {n} do not divide {channels} channels")
    if n % order or (n // order) & (n // order - 1):
        raise FuselineError(f"hadamard: {n} channels are not {order} times a power of two")
    return order, n // order


hadamard.lowers_to("codegen/templates/hadamard.py")
