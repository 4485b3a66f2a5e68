"""Mark what becomes one kernel: `fuse`.

Before                                       after  fuse
    h = rms_norm(x, w)                           y = linear_0(x, w, Wg, Wu)      a region: norm → gate, up → SwiGLU
    g = linear(h, Wg)                            z = linear_1(y, Wd, x)          a region: linear → residual add
    u = linear(h, Wu)
    y = glu(g, u, "silu")
    z = x + linear(y, Wd)

A region is a subgraph with an anchor (linears of one input, in any weight format) and what goes into its template's
prologue (a norm) and epilogue (pointwise ops), a cluster of pointwise and row operations without an anchor, an
attention by itself, or a layer's routed experts with what expands their codes; attention over a cache of codes
(`QuantizedCache`) reads the codes, and takes in what a step adds to them. What a step adds to an ordinary cache is one
kernel with the rotation before it (`appends.py`). Codegen turns a region into a few kernels, or
runs it through PyTorch and says why; in eager a region runs as it stands, so the program stays executable then, too.

Regions are convex: no value leaves one and comes back. Other nodes that touch a storage which the graph writes to and
nodes in other grad modes stay outside.

Exact: the same operations, grouped. Source: epilogue fusion as in CUTLASS and Inductor; the grouping is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...compiler import ops
from ...compiler.framework import Pass, Tier
from ...compiler.order import Partition, Reachability, sort, writes
from ...compiler.outline import cut
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rewriter import Rewriter
from .appends import append_regions, delay_counts, join_counts
from .cached import cached_regions, fold_reads
from .clusters import clusters
from .experts import expert_regions
from .linear import Region, linear_regions


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """Groups nodes into regions that become one kernel each."""

    name = "fuse"
    tier = Tier.EXACT
    ensures = frozenset({"fused"})

    linears: bool = True  # regions around linears
    pointwise: bool = True  # clusters of pointwise and row operations
    attention: bool = True  # each attention for itself
    experts: bool = True  # the routed experts of each layer

    def run(self, program: Program, rewriter: Rewriter) -> None:
        sort(program.graph)
        if self.attention:
            fold_reads(program, rewriter)
            delay_counts(program)
            join_counts(program)
        partition = Partition(Reachability(program.graph))
        regions: list[Region] = []
        taken: set[object] = set()
        if self.linears:
            regions += linear_regions(program, partition)
            taken = {n for r in regions for n in r.nodes}
        if self.experts:
            routed = list(expert_regions(program))
            taken |= {n for r in routed for n in r.nodes}
        if self.attention:
            appended = list(append_regions(program, partition, taken))
            taken |= {n for r in appended for n in r.nodes}
        if self.pointwise:
            regions += clusters(program, partition, taken)
        if self.attention:
            # An attention that reads a cache which the graph writes to stays in its place: it is cut out alone.
            attentions = [n for n in program.graph.nodes if n.target is ops.attention.overload]
            regions += [Region("attention", "attention", [n]) for n in attentions]
            regions += cached_regions(program)
            regions += appended
        if self.experts:
            regions += routed
        try:
            for region in filter(_is_read, regions):
                piece = cut(program, region.nodes, region.kind)
                rewriter.rewrite(
                    region.nodes[-1],
                    region.nodes,
                    lambda new, piece=piece, kind=region.kind: new.region(kind, piece),  # type: ignore[misc]
                    region.rule,
                    moved=[n for n in region.nodes if writes(n)],
                )
        finally:  # however many of them were made: a region stands where its last node stood
            sort(program.graph)

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        return (
            "the program has no linear, no attention, no routed experts, and no two pointwise operations that follow "
            "each other",
        )


def _is_read(region: Region) -> bool:
    """Whether anything outside reads a region: what draws random numbers stays in a graph though nothing reads it, and
    an attention that it became, or a line of an edited stage, gives no result to call a kernel for."""
    members = set(region.nodes)
    return any(user not in members for node in region.nodes for user in node.users)
