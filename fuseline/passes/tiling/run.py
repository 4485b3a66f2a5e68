"""Running a region tile by tile. The rules are those by which `sequence-parallel` computes a rank's block; a tile is
one that needs nothing of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...compiler.compat import on_fake_values
from ...compiler.program import Program
from ..sequence.collectives import Group
from ..sequence.placement import Axis, Shard, Sharded
from ..sequence.retrace import Again
from ..sequence.rules import find
from ..sequence.run import Run
from .regions import Region


class NotByPosition(Exception):
    """A region whose tiles need one another."""


@dataclass(frozen=True)
class _Part(Group):
    """One tile's positions, from `first` on."""

    first: Any = 0

    def start(self, axis: Axis) -> Any:
        return self.first

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        raise NotByPosition("heads would be exchanged for positions")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        raise NotByPosition("something of all tiles is put together")


class _Tile(Run):
    """A region's run on one tile."""

    def whole(self, source: Node) -> torch.Tensor:
        if isinstance(self.values[source], Sharded):
            raise NotByPosition(f"all positions of {source.name} are read at once")
        return self.values[source]

    def refuse(self, node: Node, reason: str) -> Any:
        raise NotByPosition(f"{node.name}: {reason}")

    def result(self, region: Region) -> Sharded:
        for node in region.nodes:
            with self._set_current_node(node):
                found = find(node.target).forward(self, node)  # type: ignore[union-attr]
            for part in found if isinstance(found, tuple) else (found,):
                if not isinstance(part, Sharded) or not part.shard.is_like(_tile_of(region.placed[node], part)):
                    raise NotByPosition(f"{node.name} has its positions elsewhere, or none")
            self.values[node] = found
        return self.values[region.exit]


def _tile_of(whole: Shard, part: Sharded) -> Shard:
    """Where a tile lies whose whole lies there."""
    return replace(whole, axis=part.shard.axis)


class Tiled(Again):
    """The program's run with some regions tile by tile.

    tiled: by exit, the region and its number of tiles; weights: by node, what stands for them.
    """

    def __init__(self, program: Program, tiled: dict[Node, tuple[Region, int]], weights: dict[Node, torch.Tensor]):
        super().__init__(program, weights)
        self.garbage_collect_values = False  # what a region reads is read at its exit
        self.tiled = tiled
        self.inner = {n for region, _ in tiled.values() for n in region.nodes} - set(tiled)

    def run_node(self, n: Node) -> Any:
        if n in self.inner:
            return None
        if n in self.tiled:
            with self._set_current_node(n):
                return in_tiles(self.module, *self.tiled[n], self.env)  # type: ignore[arg-type]
        return super().run_node(n)


def in_tiles(module: GraphModule, region: Region, count: int, values: dict[Node, Any]) -> torch.Tensor:
    """The region's result from the values of what it reads."""
    sizes = tile_sizes(region.length, count)
    parts = {n: _split(values[n], region.placed[n], sizes) for n in region.entries}
    results = [tile(module, region, sizes, values, {n: p[i] for n, p in parts.items()}, i) for i in range(count)]
    dim = region.placed[region.exit].dim  # the exit's positions are a dimension of their own
    return torch.cat([r.tensor for r in results], dim)


def tile(
    module: GraphModule, region: Region, sizes: list[Any], values: dict[Node, Any], parts: dict[Node, Any], which: int
) -> Sharded:
    """The region's result for one tile. sizes: positions of each tile; parts: the entries' tensors for this one."""
    axis = replace(region.placed[region.exit].axis, block=sizes[which], degree=len(sizes))
    run = _Tile(module, _Part("", len(sizes), which, which * sizes[0]), {})
    inside = set(region.nodes)
    run.values = {n: values[n] for node in region.nodes for n in node.all_input_nodes if n not in inside}
    for n, part in parts.items():
        run.values[n] = Sharded(part, replace(region.placed[n], axis=axis))
    return run.result(region)


def tile_sizes(length: Any, count: int) -> list[Any]:
    """Positions of each tile; the last has what is left over besides."""
    size = length // count
    return [*[size] * (count - 1), length - (count - 1) * size]


def _split(x: torch.Tensor, shard: Shard, sizes: list[Any]) -> Sequence[torch.Tensor]:
    """An entry's tiles: views where the positions are a dimension of their own, and one `cat` in the backward."""
    if shard.outer == 1 and shard.inner == 1:
        return torch.split(x, sizes, shard.dim)
    whole = x.unflatten(shard.dim, (shard.outer, shard.axis.length, shard.inner))
    return [part.flatten(shard.dim, shard.dim + 2) for part in torch.split(whole, sizes, shard.dim + 1)]


def prove(program: Program, region: Region, count: int) -> None:
    """Runs one tile on fake tensors.

    Raises:
        NotByPosition: a tile needs what it does not have, with the op.
    """
    values = {n: n.meta["val"] for node in region.nodes for n in node.all_input_nodes}
    with on_fake_values(program.fake_mode):
        sizes = tile_sizes(region.length, count)
        parts = {n: _split(values[n], region.placed[n], sizes)[0] for n in region.entries}
        tile(program.module, region, sizes, values, parts, 0)
