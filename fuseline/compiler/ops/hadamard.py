"""fuseline::hadamard: x·(C ⊗ H_2 ⊗ … ⊗ H_2)/√n along the last dimension, a rotation in n·log n steps.

C is an operand, a weight of the graph: `expressions.online_core` gives the one for a size, and any orthogonal matrix
will do. A randomised rotation is x·signs before it, with `expressions.Signs`.

    core, signs = online_core(n, x.dtype, x.device)
    y = new(ops.hadamard, x, core and new.weight(core), n, signs)
"""

from __future__ import annotations

import torch

from ..errors import FuselineError
from ._define import Kind, op


@op("hadamard(Tensor x, Tensor? core=None, int block=0, bool signs=False) -> Tensor", kind=Kind.ROW)
def hadamard(x: torch.Tensor, core: torch.Tensor | None = None, block: int = 0, signs: bool = False) -> torch.Tensor:
    """x: [..., n]; core: [K, K], absent for K = 1; the result is like x.

    signs: the core is a Hadamard matrix of 1 and −1, to be divided by √K, as one of int8 always is; otherwise it is
    orthogonal as it stands. Signs in x's own 16-bit type are what tensor cores read without a conversion.
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
        scale *= order if signs or core.dtype == torch.int8 else 1
    distance = 1
    while distance < size:
        a, b = h.unflatten(-1, (size // (2 * distance), 2, distance)).unbind(-2)
        h = torch.stack((a + b, a - b), -2).flatten(-3)
        distance *= 2
    return (h * scale**-0.5).to(x.dtype).reshape(x.shape)


@hadamard.fake
def _(x, core=None, block=0, signs=False):
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
