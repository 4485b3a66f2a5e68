"""Compute what works position by position for a part of the positions at a time: `tile`.

Before                                             after  tile{tiles=8}
    h = x + linear(attended, Wo)    [B, S, D]          for i in 0 … 7, written out:
    g, u = linear(norm(h), Wg, Wu)  [B, S, I]              h = x[i] + linear(attended[i], Wo)      [B, S/8, D]
    y = h + linear(silu(g) · u, Wd) [B, S, D]              g, u = linear(norm(h), Wg, Wu)          [B, S/8, I]
                                                           y[i] = h + linear(silu(g) · u, Wd)      [B, S/8, D]
                                                       y = cat(y[0], …, y[7])                      [B, S, D]

For training with long sequences: what an MLP is wide and its gradients then exist for one tile at a time, with
`checkpoint` behind it, which computes each tile again right before its gradient. Regions are found from the graph: all
that leads to one value by ops that work row by row along its longest dimension, and that nothing else reads. A region
is tiled where something in it is wider than what it is made from and what it makes. Between attention and the next
block's norm that is a decoder's output projection, residual, norm and MLP. What one op is wide inside of itself, as
routed experts are, is not looked at. Attention, which needs all positions, goes through its heads in groups instead:
fused kernels sum gradients in float32 and for each query head, at long sequences more than a tile of the MLP.

Gradients of weights are sums over the tiles, each rounded to the weight's type where PyTorch would have rounded once:
equal in exact arithmetic. A region ends at random ops, as tiles would draw other numbers, at writes, and at the user's
own regions of `torch.utils.checkpoint`, whose wishes are kept. More tiles take more time to compile: eight make the
graph of a decoder's training step about three times as long.

Exact: agrees with eager in float64 to rounding. Source: tiled MLPs are those of ALST (Bekman et al., 2025, section 3.1)
and Ring Attention (Liu et al., 2023, "blockwise feedforward"), found in the graph instead of named by module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler.compat import size_hint
from ...compiler.errors import UserError
from ...compiler.framework import Pass, Tier
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rewriter import Rewriter
from ..sequence.retrace import retrace
from .heads import split_heads
from .regions import Region, find_regions
from .run import NotByPosition, Tiled, prove

MOST = 8
"""Tiles, where the number is not given."""


@register
@dataclass(frozen=True, kw_only=True)
class Tile(Pass):
    """Computes position-wise regions tile by tile."""

    name = "tile"
    tier = Tier.EXACT
    example = "tile{tiles=2}"

    tiles: int = 0  # parts of the positions; 0: eight, or fewer that have `least` positions each
    least: int = 1024  # positions of a tile, at least, where `tiles` is 0
    heads: int = 0  # groups that attention's key heads go in; 0: up to four from 8 · `least` positions on; 1: together

    def run(self, program: Program, rewriter: Rewriter) -> None:
        if self.tiles < 0 or self.tiles == 1:
            raise UserError(f"pass 'tile' cannot make {self.tiles} tiles", remedy="tiles=8, or 0 to have it chosen")
        if self.heads < 0:
            raise UserError(
                f"pass 'tile' cannot make {self.heads} groups of heads", remedy="heads=4, or 0 to have it chosen"
            )
        split_heads(program, rewriter, self.heads, MOST * self.least)
        regions = [r for r in find_regions(program) if self._fits(r, program, rewriter)]
        if not regions:
            return

        def tiled(values: Sequence[Any], weights: dict[Node, torch.Tensor]) -> Any:
            return Tiled(program, {r.exit: (r, self._count(r)) for r in regions}, weights).run(*values)

        rewriter.replace_all(
            regions[0].exit, [r.exit for r in regions], lambda: retrace(program, tiled), "position-wise region"
        )

    def _fits(self, region: Region, program: Program, rewriter: Rewriter) -> bool:
        """Whether a region is long enough, and proved to work position by position."""
        length, count = size_hint(region.length), self._count(region)
        if count < 2 or length < count:
            others = f"tiles={length} or fewer" if self.tiles else f"tiles=2 or least={max(1, length // 2)}"
            rewriter.refuse(region.exit, f"{length} positions are too few to tile: {others} would do")
            return False
        try:
            prove(program, region, count)
        except NotByPosition as error:
            rewriter.refuse(region.exit, str(error))
            return False
        return True

    def _count(self, region: Region) -> int:
        return self.tiles or min(MOST, size_hint(region.length) // self.least)

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        return (
            "no region of the graph works position by position, is read as a whole by nothing else, and is wider "
            "inside than what it is made from and what it makes",
            f"attention's heads were asked to stay together, or fewer than {MOST * self.least} positions attend",
        )
