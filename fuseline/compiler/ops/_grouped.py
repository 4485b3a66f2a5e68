"""Products of rows with the matrix of the expert that each row goes to: what the MoE ops are made of.

Rows are sorted by expert. On a CPU each expert multiplies its own rows; on a GPU nothing waits for the device: 16-bit
products go to PyTorch's grouped matrix product, others gather each row's matrix, some rows at a time.
"""

from __future__ import annotations

import torch

AT_ONCE = 1 << 27
"""Elements of the matrices that are gathered at a time."""


class Rows:
    """The T·K pairs of token and expert, in the order of experts.

    indices: int64 [T, K]. order: which pair comes where; tokens: each row's token; experts: each row's expert, rising;
    all int64 [T·K].
    """

    def __init__(self, indices: torch.Tensor, experts: int):
        self.k, self.count = indices.shape[1], experts
        self.experts, self.order = torch.sort(indices.reshape(-1), stable=True)
        self.tokens = self.order // self.k
        self.ends = torch.searchsorted(
            self.experts, torch.arange(experts, device=indices.device), right=True, out_int32=True
        )

    def spans(self) -> list[tuple[int, int, int]]:
        """(expert, first row, row after the last) of each expert that has rows; waits for the device."""
        ends = self.ends.tolist()
        return [(e, a, b) for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a]

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [T·K, …] by token: [T, K, …]."""
        inverse = torch.empty_like(self.order)
        inverse[self.order] = torch.arange(len(self.order), device=rows.device)
        return rows[inverse].unflatten(0, (-1, self.k))


def grouped(x: torch.Tensor, weight: torch.Tensor, rows: Rows) -> torch.Tensor:
    """x [S, n], weight [E, m, n] → [S, m]: each row times its expert's matrix, transposed; in x's dtype."""
    if x.device.type == "cpu":
        parts = [x[a:b] @ weight[e].t() for e, a, b in rows.spans()]
        return torch.cat(parts) if parts else x.new_empty((0, weight.shape[1]))
    if _has_kernel(x, weight):
        return torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=rows.ends)
    step = max(1, AT_ONCE // (weight.shape[1] * weight.shape[2]))
    parts = [
        torch.bmm(weight[rows.experts[a : a + step]], x[a : a + step, :, None]).squeeze(-1)
        for a in range(0, max(1, len(x)), step)
    ]
    return torch.cat(parts)


def outer(grad: torch.Tensor, x: torch.Tensor, rows: Rows) -> torch.Tensor:
    """grad [S, m], x [S, n] → [E, m, n]: for each expert the sum over its rows of grad·xᵀ; waits for the device."""
    found = x.new_zeros((rows.count, grad.shape[1], x.shape[1]))
    for e, a, b in rows.spans():
        torch.mm(grad[a:b].t(), x[a:b], out=found[e])
    return found


def summed(grad: torch.Tensor, rows: Rows) -> torch.Tensor:
    """grad [S, m] → [E, m]: for each expert the sum over its rows."""
    return grad.new_zeros((rows.count, grad.shape[1])).index_add_(0, rows.experts, grad)


def _has_kernel(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product runs without waiting for the device: bfloat16, rows of whole 16 bytes."""
    whole = all(size % 8 == 0 for size in weight.shape[1:]) and 1 in weight.stride()[1:]
    return hasattr(torch.nn.functional, "grouped_mm") and x.dtype == weight.dtype == torch.bfloat16 and whole
