"""Fold rotations into weights: `rotate`.

Before                                  after  rotate{r2,r4}
    v = linear(x, Wv)                       v = linear(x, Wv·R2)             folded into rows
    o = attention(q, k, v)                  o = attention(q, k, v)           mixes tokens, not channels
    y = linear(o, Wo)                       y = linear(o, Wo·R2)             folded into columns
    z = linear(silu(g) * u, Wd)             z = linear(hadamard(silu(g) * u), Wd·R4)

`r1`      the residual stream, by one rotation of the model's width, folded into all that writes and reads it, with the
          scales of the norms between.
`r2`      values and what attention makes of them, by one of the head's size a layer, folded.
`r3`      queries and keys, at run time, where they meet: their products stay the same.
`r4`      the input of the last linear of an MLP, at run time, folded into that linear's columns.
`kind`    hadamard; random-hadamard and orthogonal take `seed`.
`block`   rotates runs of so many channels by themselves, for r1 and r4; 0: the whole width.
`untie`   copies a table that is both embedding and head, so that r1 folds into both; else the stream is rotated at run
          time behind the embedding, and back before the last norm.

No names are matched: a basis is followed through whatever carries it, and R is folded where the stream is written and
read. What needs single channels (a norm whose result is added, a gate, a cache that other graphs read) is a boundary:
r2 is refused there, and so is r1 where more than two operations would be left at run time. Each fold is a rewrite of
its own that keeps the program's results. Embeddings are not centred.

Under training, frozen weights fold. What a gradient should reach is rotated at each call where it is thin (the matrices
of a low-rank adapter), and the gradient passes through that; other trained weights are boundaries.

Exact: logits agree within 1e-5 in float32. Sources: QuaRot (Ashkboos et al., 2024), SpinQuant (Liu et al., 2024).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from ...compiler.errors import UserError
from ...compiler.framework import Pass, Tier
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rewriter import Rewriter
from .carriers import is_attention
from .centring import centre
from .folds import Folds
from .inputs import rotate_inputs
from .keys import rotate_keys
from .rotations import Kind, Rotation, no_blocks
from .stream import Stream, flood, is_norm
from .turn import Turn

ONLINE = 2
"""Operations at run time that r1 may leave in a stream: behind a tied embedding, and before the last norm."""


@register
@dataclass(frozen=True)
class Rotate(Pass):
    """Rotations of the residual stream, of values, of queries and keys, and of the inputs of MLPs' last linears."""

    name = "rotate"
    tier = Tier.EXACT
    example = "raise,rotate{r2,r4}"
    requires = frozenset({"raised"})

    r1: bool = False  # the residual stream
    r2: bool = False  # values, by head
    r3: bool = False  # queries and keys, by head
    r4: bool = False  # inputs of the MLPs' last linears
    kind: Kind = Kind.HADAMARD
    block: int = 0  # channels that r1 and r4 rotate together; 0: all
    seed: int = 0
    untie: bool = False  # fold r1 into copies of a tied table

    def __post_init__(self) -> None:
        if not (self.r1 or self.r2 or self.r3 or self.r4):
            raise UserError("pass 'rotate' needs to be told what to rotate", remedy="rotate{r2,r4} or rotate{r1,r2,r4}")

    def run(self, program: Program, rewriter: Rewriter) -> None:
        if self.r1:
            centre(program, rewriter, Folds(program, self.untie), ONLINE)
            self._streams(program, rewriter, Folds(program, self.untie))
        folds = Folds(program, untie=False)
        if self.r2:
            self._values(program, rewriter, folds)
        if self.r3:
            rotate_keys(program, rewriter, lambda size: self._rotation("R3", size))
        if self.r4:
            rotate_inputs(program, rewriter, folds, lambda size: self._rotation("R4", self._block(size)))

    def _rotation(self, label: str, size: int) -> Rotation:
        return Rotation(label, size, self.kind, self.seed)

    def _block(self, size: int) -> int:
        return self.block or size

    def _streams(self, program: Program, rewriter: Rewriter, folds: Folds) -> None:
        seen: set[Node] = set()
        for norm in [n for n in program.graph.nodes if is_norm(n)]:
            if norm._erased or norm in seen or norm.args[0] in seen:
                continue
            size = int(norm.meta["val"].shape[-1])
            stream = flood(norm.args[0], self._block(size), folds)
            seen |= stream.before.keys()
            reason = no_blocks(size, stream.block) or _refuse_stream(stream)
            if reason:
                rewriter.refuse(norm, f"R1: {reason}")
                continue
            turn = Turn(program, rewriter, self._rotation("R1", stream.block), stream, folds)
            turn.apply()
            seen |= turn.turned.keys() | {turned.node for turned in turn.turned.values()}

    def _values(self, program: Program, rewriter: Rewriter, folds: Folds) -> None:
        for node in [n for n in program.graph.nodes if is_attention(n)]:
            values = node.args[2]
            size = int(values.meta["val"].shape[-1])
            stream = flood(values, size, folds)
            reason = _refuse_values(stream)
            if reason:
                rewriter.refuse(node, f"R2: {reason}")
            else:
                Turn(program, rewriter, self._rotation("R2", size), stream, folds).apply()


def _refuse_stream(stream: Stream) -> str | None:
    if not stream.readers:
        return "no product reads what this norm returns"
    if stream.online > ONLINE:
        where = next(iter(stream.leaves.values()), None) or stream.enters[0]
        return f"{stream.online} operations would be left at run time, the first at {where.name} ({where.target})"
    return None


def _refuse_values(stream: Stream) -> str | None:
    if stream.enters:
        return (
            f"the values come from {stream.enters[0].name} ({stream.enters[0].target}), which R cannot be folded into"
        )
    if stream.leaves:
        use = next(iter(stream.leaves.values()))
        return f"{use.name} ({use.target}) reads single channels of what attention returns, or keeps the values"
    return None if stream.readers and stream.is_written else "no product reads what attention returns"
