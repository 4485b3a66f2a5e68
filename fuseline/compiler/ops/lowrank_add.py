"""fuseline::lowrank_add: a stack of matrices, to each of which a low rank of its own is added.

Source: MiLo (Huang et al., 2025), experts in few bits with low-rank compensation.
"""

from __future__ import annotations

import torch

from ._define import Kind, op


@op(
    "lowrank_add(Tensor base, Tensor up, Tensor down, int[] ranks, Tensor? starts=None) -> Tensor",
    kind=Kind.OTHER,
)
def lowrank_add(
    base: torch.Tensor, up: torch.Tensor, down: torch.Tensor, ranks: list[int], starts: torch.Tensor | None = None
) -> torch.Tensor:
    """base: [E, m, n]; up: [R, m]; down: [R, n]; ranks: of each matrix, R in sum. base[e] + up[rows of e]ᵀ·down[rows of
    e], of base's shape and dtype, where the rows of the first matrix come first.

    starts: int32 [E + 1], where each matrix's rows begin, and R: what `ranks` says, on the device. Kernels read it;
    code generation puts it in (codegen/repack.py).
    """
    parts = []
    start = 0
    for e, rank in enumerate(ranks):
        rows = slice(start, start + rank)
        parts.append(torch.addmm(base[e], up[rows].t().to(base.dtype), down[rows].to(base.dtype)))
        start += rank
    return torch.stack(parts)


@lowrank_add.fake
def _(base, up, down, ranks, starts=None):
    return base.new_empty(base.shape)


lowrank_add.lowers_to("codegen/templates/moe.py")
