"""Fold rotations into weights: `rotate`.

Before                                  after  rotate{r2,r4}
    v = linear(x, Wv)                       v = linear(x, Wv·R2)             folded into rows
    o = attention(q, k, v)                  o = attention(q, k, v)           mixes tokens, not channels
    y = linear(o, Wo)                       y = linear(o, Wo·R2)             folded into columns
    z = linear(silu(g) * u, Wd)             z = linear(hadamard(silu(g) * u), Wd·R4)

`r1`      the residual stream, by one rotation of the model's width, folded into all that writes and reads it, with the
          scales of the norms between.
`r2`      values and what attention makes of them, by one of the head's size a layer, folded.
`r3`      queries and keys, at run time, where they meet: their products stay the same. What goes into a cache, or to
          the caller, keeps its basis: a pair R·Rᵀ around it lets `quantize{keys,values}` round between the two.
`r4`      the input of the last linear of an MLP, at run time, folded into that linear's columns.
`kind`    hadamard; random-hadamard and orthogonal take `seed`; learned starts r1 and each r2 from a random Hadamard
          matrix and turns them, over `steps` of calibration batches, to where the passes behind this one cost least.
`loss`    what is learned and chosen by: divergence from the model as it was, next-token loss, or the results' error.
`choose`  keeps of r1, r2, r3 and r4 those that lower that loss on the calibration data, the best first.
`block`   rotates runs of so many channels by themselves, for r1 and r4; 0: the whole width.
`untie`   copies a table that is both embedding and head, so that r1 folds into both; else the stream is rotated at run
          time behind the embedding, and back before the last norm.

No names are matched: a basis is followed through whatever carries it, and R is folded where the stream is written and
read. What needs single channels (a norm whose result is added, a gate, a cache that other graphs read) is a boundary:
r2 is refused there, and so is r1 where more than two operations would be left at run time, or nothing that writes the
stream takes R. Each fold is a rewrite of its own that keeps the program's results, and is proved to with `--prove`
(docs/debugging.md). Embeddings are not centred. docs/rotations.md has what becomes of a hundred models.

Under training, frozen weights fold. What a gradient should reach is rotated at each call where it is thin (the matrices
of a low-rank adapter), and the gradient passes through that; other trained weights are boundaries.

Routed experts fold like other products, one stack by its columns and one by its rows; R4 refuses them, since what their
last product reads is made inside their one op: `raise{experts=false}` leaves their products apart, and R4 takes them.

Exact: logits agree within 1e-5 in float32. Sources: QuaRot (Ashkboos et al., 2024), SpinQuant (Liu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch.fx import Node

from ...compiler.errors import UserError
from ...compiler.framework import Findings, Pass, Study, Tier
from ...compiler.plan import SitePlan
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rewriter import Rewriter
from .axioms import ALGEBRA
from .caches import Added, added, pair_around
from .carriers import is_attention, values_of
from .centring import centre
from .folds import Folds
from .inputs import rotate_inputs
from .keys import rotate_keys
from .learning import LEARNT, MODEL, Loss, decide, findings
from .prepare import prepare
from .rotations import Kind, Rotation, no_blocks
from .stream import Stream, flood, is_norm
from .turn import Turn

LABELS = ("r1", "r2", "r3", "r4")
Rotations = Callable[[str, Node, int], Rotation | None]
_LEARNED = "rotate{r1,r2,r4,kind=learned,steps=100}"
ONLINE = 2
"""Operations at run time that r1 may leave in a stream: behind a tied embedding, and before the last norm."""


@register
@dataclass(frozen=True)
class Rotate(Pass):
    """Rotations of the residual stream, of values, of queries and keys, and of the inputs of MLPs' last linears."""

    name = "rotate"
    tier = Tier.EXACT
    example = "raise,rotate{r2,r4}"
    algebra = ALGEBRA
    requires = frozenset({"raised"})

    r1: bool = False  # the residual stream
    r2: bool = False  # values, by head
    r3: bool = False  # queries and keys, by head
    r4: bool = False  # inputs of the MLPs' last linears
    kind: Kind = Kind.HADAMARD  # of matrix
    block: int = 0  # channels that r1 and r4 rotate together; 0: all
    seed: int = 0  # of random signs and matrices
    untie: bool = False  # fold r1 into copies of a tied table
    steps: int = 100  # of learning
    rate: float = 0.1  # of learning: how far a step turns, in radians
    loss: Loss = Loss.AUTO  # what to learn and choose by
    choose: bool = False  # keep those that pay

    def __post_init__(self) -> None:
        if not self.asked:
            raise UserError("pass 'rotate' needs to be told what to rotate", remedy="rotate{r2,r4} or rotate{r1,r2,r4}")
        if self.kind is Kind.LEARNED and not (self.r1 or self.r2):
            raise UserError("only r1 and r2 are learned: the others run fast as Hadamard matrices", remedy=_LEARNED)
        if self.steps < 1 or self.rate <= 0:
            raise UserError("learning takes steps=1 or more and a rate above 0", remedy=_LEARNED)

    @property
    def asked(self) -> tuple[str, ...]:
        """Which of r1, r2, r3 and r4."""
        return tuple(label for label in LABELS if getattr(self, label))

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether something is learned or chosen."""
        return self.choose or self.kind is Kind.LEARNED

    def decide(self, study: Study) -> dict[str, SitePlan]:
        return decide(self, study)

    def findings(self, decisions: Mapping[str, SitePlan]) -> Findings:
        return findings(self, decisions)

    def run(self, program: Program, rewriter: Rewriter) -> None:
        if not self.needs_data:
            self.apply(program, rewriter, lambda label, node, size: Rotation(label, size, self.kind, self.seed))
            return
        whole = rewriter.decisions.get(MODEL)
        kept = whole.structure["keep"] if whole is not None else list(self.asked)
        node = next((n for n in program.graph.nodes if is_norm(n) or is_attention(n)), None)
        for label in self.asked:
            if label not in kept and node is not None:
                rewriter.refuse(node, f"{label}: {whole.structure['why'][label]}", label)  # type: ignore[union-attr]
        if kept:
            self.only(kept).apply(program, rewriter, partial(self._planned, rewriter))

    def only(self, labels: Sequence[str]) -> Rotate:
        """The same pass for some of what it names."""
        flags: dict[str, Any] = {label: label in labels for label in self.asked}
        return replace(self, choose=False, **flags)

    def apply(self, program: Program, rewriter: Rewriter, rotation: Rotations) -> None:
        """Rotates all that this pass names by what `rotation` gives: label, node, channels → R, or None."""
        prepare(program, rewriter, Folds(program, self.untie))
        if self.r1:
            centre(program, rewriter, Folds(program, self.untie), ONLINE)
            self._streams(program, rewriter, Folds(program, self.untie), rotation)
        folds = Folds(program, untie=False)
        if self.r2:
            self._values(program, rewriter, folds, rotation)
        if self.r3:
            rotate_keys(program, rewriter, partial(rotation, "R3"))
        if self.r4:
            rotate_inputs(program, rewriter, folds, self.block, partial(rotation, "R4"))

    def _planned(self, rewriter: Rewriter, label: str, node: Node, size: int) -> Rotation | None:
        if self.kind is not Kind.LEARNED or label not in LEARNT:
            kind = Kind.HADAMARD if self.kind is Kind.LEARNED else self.kind
            return Rotation(label, size, kind, self.seed)
        decision = rewriter.decision(node)
        return Rotation(label, size, self.kind, self.seed, decision.tensors[label]) if decision is not None else None

    def _streams(self, program: Program, rewriter: Rewriter, folds: Folds, rotation: Rotations) -> None:
        seen: set[Node] = set()
        for norm in [n for n in program.graph.nodes if is_norm(n)]:
            if norm._erased or norm in seen or norm.args[0] in seen:
                continue
            size = int(norm.meta["val"].shape[-1])
            stream = flood(norm.args[0], self.block or size, folds)
            seen |= stream.before.keys()
            reason = no_blocks(size, stream.block) or _refuse_stream(stream)
            if reason:
                rewriter.refuse(norm, f"R1: {reason}")
                continue
            turned = rotation("R1", norm, stream.block)
            if turned is None:
                continue
            turn = Turn(program, rewriter, turned, stream, folds)
            turn.apply()
            seen |= turn.turned.keys() | {made.node for made in turn.turned.values()}

    def _values(self, program: Program, rewriter: Rewriter, folds: Folds, rotation: Rotations) -> None:
        for node in [n for n in program.graph.nodes if values_of(n) is not None]:
            values = None if node._erased else values_of(node)
            if values is None:
                continue  # turned with another's
            size = int(values.meta["val"].shape[-1])
            stream = flood(values, size, folds)
            reason = _refuse_values(stream)
            held = added(values) if is_attention(node) else ""
            if reason and isinstance(held, Added) and held.shared and not held.also:
                if (turned := rotation("R2", node, size)) is not None:
                    pair_around(rewriter, held, turned, "R2 pair")
            elif reason:
                rewriter.refuse(node, f"R2: {reason}", "values")
            elif (turned := rotation("R2", node, size)) is not None:
                Turn(program, rewriter, turned, stream, folds).apply()


def _refuse_stream(stream: Stream) -> str | None:
    if not stream.readers:
        return "no product reads what this norm returns"
    if stream.online > ONLINE:
        where = next(iter(stream.leaves.values()), None) or stream.enters[0]
        return f"{stream.online} operations would be left at run time, the first at {where.name} ({where.target})"
    if not stream.is_written:
        first = stream.enters[0]
        return f"it reads {first.name} ({first.target}), which R cannot be folded into, and nothing else"
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
