"""An orthogonal matrix on blocks of channels, as a weight's expression and as an operation at run time.

hadamard         H/√n of the block's size, its own inverse
random-hadamard  diag(signs)·H/√n, the signs drawn from a seed
orthogonal       a dense random matrix: the Q of a Gaussian matrix's QR decomposition (Stewart, 1980)
learned          a dense matrix that a plan holds (`learning/`)
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch.fx import Node

from ...compiler import ops
from ...compiler.expressions import (
    Blocks,
    Cast,
    Concat,
    Expression,
    Hadamard,
    Orthogonal,
    Param,
    Planned,
    Scale,
    Signs,
    Transpose,
    online_core,
)  # fmt: skip
from ...compiler.rewriter import Builder

aten = torch.ops.aten


class Kind(enum.Enum):
    """How a rotation's matrix is made."""

    HADAMARD = "hadamard"
    RANDOM_HADAMARD = "random-hadamard"
    ORTHOGONAL = "orthogonal"
    LEARNED = "learned"


@dataclass(frozen=True)
class Rotation:
    """R on each block of `block` channels; `label` names it: R1, R2, R4. `matrix`: R itself, where it was learned."""

    label: str
    block: int
    kind: Kind
    seed: int
    matrix: torch.Tensor | None = None

    def fold(self, weight: Expression, value: torch.Tensor, dim: int, scale: Expression | None = None) -> Expression:
        """The weight with dimension `dim` multiplied by `scale`, then by R, block by block, in float64.

        value: the weight's fake value. A writer's rows and a reader's columns are folded alike: y·R = x·(Rᵀ·W)ᵀ and
        x·Wᵀ = (x·R)·(W·R)ᵀ.
        """
        dim %= value.dim()
        wide: Expression = Cast(weight, torch.float64)
        if scale is not None:
            wide = Scale(wide, scale, dim)
        return Cast(self._times(wide, dim, value.shape[dim], str(value.device)), value.dtype)

    def value(self) -> torch.Tensor:
        """R as a matrix [block, block] in float64, on the CPU."""
        eye = torch.eye(self.block, dtype=torch.float64)
        value: torch.Tensor = self._times(Param("x"), 1, self.block, "cpu").evaluate({"x": eye}.__getitem__)
        return value

    def _times(self, x: Expression, dim: int, size: int, device: str) -> Expression:
        dense = self._dense(device)
        if dense is not None:
            return Blocks(x, dense, dim)
        if self.kind is Kind.RANDOM_HADAMARD:
            x = Scale(x, self._signs(size, torch.float64, device), dim)
        return Hadamard(x, dim, self.block)

    def _dense(self, device: str) -> Expression | None:
        """R as a matrix, where it has no fast form."""
        if self.matrix is not None:
            return Planned.of(self.matrix, device)
        return Orthogonal(self.block, self.seed, device) if self.kind is Kind.ORTHOGONAL else None

    def _signs(self, size: int, dtype: torch.dtype, device: str) -> Expression:
        one = Signs(self.block, self.seed, dtype, device)
        return one if size == self.block else Concat((one,) * (size // self.block), 0)

    def fold_at_run_time(self, new: Builder, weight: Node, dim: int, scale: Expression | None = None) -> Node:
        """What `fold` makes of a weight, computed in the graph, so that a gradient reaches the weight."""
        value = weight.meta["val"]
        last = value.dim() - 1
        flips = dim % value.dim() != last
        turned = new(aten.transpose.int, weight, dim, last) if flips else weight
        if scale is not None:
            turned = new(aten.mul.Tensor, turned, new.weight(Cast(scale, value.dtype)))
        turned = self.online(new, turned)
        return new(aten.transpose.int, turned, dim, last) if flips else turned

    def online(self, new: Builder, x: Node, inverse: bool = False) -> Node:
        """x·R, or x·Rᵀ, computed at run time."""
        value = x.meta["val"]
        size, dtype, device = int(value.shape[-1]), value.dtype, str(value.device)
        dense = self._dense(device)
        if dense is not None:
            matrix: Expression = Cast(dense, dtype)
            table = new.weight(Transpose(matrix, 0, 1) if inverse else matrix)
            if size == self.block:
                return new(aten.matmul.default, x, table)
            blocks = new(aten.unflatten.int, x, -1, [size // self.block, self.block])
            return new(aten.flatten.using_ints, new(aten.matmul.default, blocks, table), -2, -1)
        signs = new.weight(self._signs(size, dtype, device)) if self.kind is Kind.RANDOM_HADAMARD else None
        if signs is not None and not inverse:
            x = new(aten.mul.Tensor, x, signs)
        core, is_signs = online_core(self.block, dtype, device)
        x = new(ops.hadamard, x, None if core is None else new.weight(core), self.block, is_signs)
        return new(aten.mul.Tensor, x, signs) if signs is not None and inverse else x


def no_blocks(size: int, block: int) -> str | None:
    """Why so many channels cannot be rotated in such blocks."""
    return f"{size} channels are no number of blocks of {block}" if size % block else None
