"""Cut the sequence among processes: `sequence-parallel`.

Before                                          after  sequence-parallel{degree=4}, on rank r
    h = embedding(W, ids)          [B, S, D]       h = embedding(W, ids[:, block r])      [B, S/4, D]
    q, k, v = heads(linear(h, …))  [B, H, S, d]    q, k, v = heads(linear(h, …))          [B, H, S/4, d]
                                                   q, k, v = all_to_all(q, k, v)          [B, H/4, S, d]
    o = sdpa(q, k, v, mask)                        o = sdpa(q, k, v, mask)
                                                   o = all_to_all(o)                      [B, H, S/4, d]
    loss = cross_entropy(logits, labels)           loss = all_reduce(Σ over own tokens) / all_reduce(their number)

Every process calls the model with the whole batch, and every process gets the loss of the whole batch. Where the
sequence is, is found from attention, back to the token ids; nothing is tagged. What was made of whole numbers
(positions, masks, shifted labels, documents) stays whole on every rank and means what it meant. Any length and any
number of heads go: short blocks are padded inside and left out of sums, key heads go to all ranks that read them.

`kind=ring` sends keys and values around the ranks instead (online softmax; causal masks balanced by a zigzag layout of
positions): for few heads, where there is no mask or one that `raise` has proved causal. `kind=hybrid` shares the degree
between both: neighbouring ranks exchange heads, and `ring` such groups pass keys and values around. `auto` takes what
is predicted to be fastest (`choice.py`).

`inputs=sharded` is for callers who give each rank its own part of the sequence: `parts.py`.

Gradients: with no wrapper around the model, parameters' gradients are summed over the ranks, so each rank has the full
ones (`gradients=inside`). Under DistributedDataParallel or fully_shard they are scaled so that the wrapper's average is
the full gradient (`gradients=outside`); `auto` looks which it is.

Outputs: a model that computes its loss in the graph returns logits cut like the sequence; one that does not returns
them whole (`outputs=auto`; or `gathered`, `sharded`).

An op of which no rule says what a rank would compute is refused with its line; `gather=NAME` gathers the inputs of such
ops instead.

Exact: loss and gradients agree with one process within 1e-9 in float64 where the model casts nothing. Dropout draws
anew on each rank, so it agrees in distribution. Source: DeepSpeed-Ulysses (Jacobs et al., 2023) for the exchange, Liu
et al., 2023, for the ring; the placements are those of GSPMD (Xu et al., 2021). AutoSP (2026) does this on PyTorch IR,
for fewer models.
"""

from __future__ import annotations

import enum
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler import compat, process_groups
from ...compiler.errors import UserError
from ...compiler.framework import Pass, Tier
from ...compiler.machine import machine_of
from ...compiler.ops import scale_gradient, sum_gradient
from ...compiler.program import Program
from ...compiler.provenance import source_lines
from ...compiler.registry import register
from ...compiler.rewriter import Rewriter
from . import breaks, choice, parts, ring
from .choice import Layout, Work
from .collectives import Group
from .experts import as_one_op
from .placement import Axis, Partial, Sharded
from .retrace import retrace
from .run import Run
from .sites import Site, attentions, starts, trace_back

log = logging.getLogger("fuseline")


class Kind(enum.Enum):
    """How positions meet in attention."""

    AUTO = "auto"
    ULYSSES = "ulysses"  # each rank has all positions for some heads: any mask
    RING = "ring"  # keys and values go around: no mask or a causal one, any number of heads
    HYBRID = "hybrid"  # heads among neighbours, keys and values around their groups


class Inputs(enum.Enum):
    """What the caller gives each rank."""

    FULL = "full"  # the whole batch
    SHARDED = "sharded"  # its own positions, in order, as many as every other rank


class Gradients(enum.Enum):
    """Who puts the ranks' gradients together."""

    AUTO = "auto"
    INSIDE = "inside"
    OUTSIDE = "outside"


class Outputs(enum.Enum):
    """What a caller gets of results that are cut."""

    AUTO = "auto"
    GATHERED = "gathered"
    SHARDED = "sharded"


@register
@dataclass(frozen=True, kw_only=True)
class SequenceParallel(Pass):
    """Cuts the sequence among the ranks of a process group."""

    name = "sequence-parallel"
    tier = Tier.EXACT
    trial = "torchrun --nproc-per-node=2 examples/sequence_parallel.py"

    degree: int | None = None  # ranks that share a sequence; auto: all, or the mesh dimension's
    kind: Kind = Kind.AUTO  # heads are exchanged, or keys and values go around
    ring: int | None = None  # groups that a hybrid passes keys and values around; auto: by the cost model
    inputs: Inputs = Inputs.FULL  # whether every rank gets the whole batch, or its part
    mesh: str | None = None  # a dimension of a DeviceMesh, by name
    gradients: Gradients = Gradients.AUTO  # who sums them: the graph, or a wrapper around the model
    outputs: Outputs = Outputs.AUTO  # whether logits come back whole
    gather: tuple[str, ...] = ()  # ops whose inputs may be gathered where no rule knows better

    def run(self, program: Program, rewriter: Rewriter) -> None:
        """Runs the program once more with every value placed, and puts what was traced in its place."""
        found = attentions(program.graph)
        if not found and breaks.goes_on(program):
            rewriter.excused = "it goes on behind a graph break, with results that every rank has whole"
            return
        if not found:
            rewriter.excused = breaks.between_blocks(program)
            return
        breaks.tell_of_blocks()
        _refuse_writes(program)
        as_one_op(program, rewriter)
        found = attentions(program.graph)
        ranks = process_groups.find(self.degree, self.mesh, f"pass '{self.name}'")
        if ranks.size == 1:
            raise UserError(
                f"pass '{self.name}' has one process to cut the sequence for",
                [f"{ranks.world} processes in all"],
                f"{process_groups.LAUNCH}; or leave the pass out",
            )
        process_groups.agree(ranks, _facts(self, program), f"pass '{self.name}'")
        group = Group(ranks.name, ranks.size, ranks.rank)
        outside = self._averaged(program)
        given = program
        if self.inputs is Inputs.SHARDED:
            given = parts.gathered(program, found, group, outside)
            found = attentions(given.graph)
        layout = self._layout(found, ranks.size)
        inner, rings = _groups(ranks, layout)
        balanced = rings is not None and ring.check([site.node for site in found])
        families = Families(ranks.size, layout.ring if balanced else 0)
        first = starts(trace_back(found, families.of))
        if not first:
            raise breaks.inside_attention(program, found[0].node)

        def one_rank(values: Sequence[Any], weights: dict[Node, torch.Tensor]) -> Any:
            run = Run(given.module, group, first, self.gather)
            run.inner, run.rings = inner, rings
            run.weights = weights if outside else {n: _summed(w, group) for n, w in weights.items()}
            whole = self.inputs is Inputs.FULL
            results = run.run(*(_arriving(v, group, outside) if whole else v for v in values))
            left = leave(run, results, self.outputs, outside)
            tell_of_gathers(run)
            return left

        rewriter.replace_all(
            found[0].node,
            [site.node for site in found],
            lambda: retrace(given, one_rank),
            "attention",
        )
        breaks.cut(program)

    def needs_symbols(self) -> bool:
        return self.inputs is Inputs.SHARDED

    def _layout(self, found: Sequence[Site], degree: int) -> Layout:
        """How the ranks share the degree between heads and a ring.

        Raises:
            UserError: a hybrid was asked for that the degree has no two factors for.
        """
        if self.ring is not None and self.kind is not Kind.HYBRID:
            raise UserError(f"pass '{self.name}': ring={self.ring} says how kind=hybrid shares the degree",
                            [f"kind={self.kind.value}"], f"kind=hybrid,ring={self.ring}")  # fmt: skip
        if self.kind is Kind.ULYSSES:
            return Layout(degree, 1)
        if self.kind is Kind.RING:
            return Layout(1, degree)
        nodes = [site.node for site in found]
        machine = machine_of(choice.device_of(nodes))
        if self.kind is Kind.AUTO:
            if self.inputs is Inputs.SHARDED or self.outputs is Outputs.SHARDED:
                return Layout(degree, 1)  # the caller reads results in the order of positions, not in a ring's
            if any(map(ring.reason, nodes)) or len(set(map(ring.is_causal, nodes))) > 1:
                return Layout(degree, 1)
            works = [Work.of(n, ring.is_causal(n)) for n in nodes]
            return choice.choose(works, list(choice.layouts(degree)), machine)
        ring.check(nodes)
        mixed = [k for k in choice.layouts(degree) if k.kind == "hybrid" and self.ring in (None, k.ring)]
        if not mixed:
            fits = [str(k.ring) for k in choice.layouts(degree) if k.kind == "hybrid"]
            raise UserError(
                f"pass '{self.name}' cannot share degree {degree} between heads and a ring"
                + (f" of {self.ring}" if self.ring is not None else ""),
                remedy=f"ring={' or '.join(fits)}" if fits else "kind=ulysses or kind=ring",
            )
        return choice.choose([Work.of(n, ring.is_causal(n)) for n in nodes], mixed, machine)

    def _averaged(self, program: Program) -> bool:
        """Whether a wrapper will average gradients over the ranks."""
        if self.gradients is not Gradients.AUTO:
            return self.gradients is Gradients.OUTSIDE
        return compat.gradients_are_averaged([s.tensor for s in program.sources.values()])

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        what = "no attention in this graph: neither a call of scaled_dot_product_attention nor one written out"
        return (what, *breaks.named(program))

    def remedy(self, program: Program) -> str | None:
        return breaks.REMEDY if program.ends_at else None


class Families:
    """Sequence lengths of a program, and how each is cut: equal lengths in the same way."""

    def __init__(self, degree: int, zigzag: int = 0):
        self._degree, self._zigzag = degree, zigzag
        self._known: dict[str, Axis] = {}

    def of(self, length: Any) -> Axis:
        """How a sequence of this length is cut.

        Raises:
            UserError: it is shorter than the degree.
        """
        text = str(compat.symbolic_expression(length))
        if text not in self._known:
            if length < self._degree:
                raise UserError(
                    f"a sequence of {compat.size_hint(length)} positions cannot be cut for {self._degree} ranks",
                    ["every rank needs one position at least"],
                    f"longer sequences, or degree={max(1, compat.size_hint(length))} or less",
                )
            # A member of a zigzag ring has two halves, and is cut for its ranks: parts that serve both.
            parts = self._zigzag * math.lcm(2, self._degree // self._zigzag) if self._zigzag else self._degree
            even = bool(length % parts == 0)  # for a symbolic length a guard: the other case compiles apart
            part = length // parts if even else (length + parts - 1) // parts
            block = part * (parts // self._degree)
            self._known[text] = Axis(length, block, self._degree, even, zigzag=self._zigzag)
        return self._known[text]


def _groups(ranks: process_groups.Ranks, layout: Layout) -> tuple[Group | None, Group | None]:
    """The ranks that exchange heads within a member of a ring, and those that a ring goes through."""
    if layout.ring == 1:
        return None, None
    if layout.heads == 1:
        return None, Group(ranks.name, ranks.size, ranks.rank)
    inner, rings = process_groups.split(ranks, layout.heads)
    return Group(inner.name, inner.size, inner.rank), Group(rings.name, rings.size, rings.rank)


def _facts(step: Pass, program: Program) -> str:
    """What ranks have to have in common before they wait for one another in collectives."""
    given = [program.examples[i] for i in program.arguments] if program.examples else []
    shapes = [f"{n.name} {tuple(compat.size_hint(s) for s in v.shape)}" for n, v in zip(program.placeholders, given)
              if isinstance(v, torch.Tensor)]  # fmt: skip
    # Of symbolic sizes and strides a rank may have more than another (a view that begins elsewhere).
    values = (n.meta.get("val") for n in program.graph.nodes if n.op == "call_function")
    return f"{step}; {', '.join(shapes)}; {sum(isinstance(v, torch.Tensor) for v in values)} operations"


def _summed(weight: torch.Tensor, group: Group) -> torch.Tensor:
    return sum_gradient(weight, group.name) if weight.requires_grad else weight


def _arriving(value: Any, group: Group, outside: bool) -> Any:
    """An input whose gradient somebody before this graph waits for gets the whole of it on every rank."""
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return sum_gradient(value, group.name, 1 / group.degree if outside else 1.0)
    return value


def leave(run: Run, results: Any, outputs: Outputs, outside: bool) -> Any:
    """The results as the caller gets them, and the caller's gradients as the graph wants them: every rank's caller
    starts from the same gradient of a whole result, so each brings its share."""
    nodes = results if isinstance(results, (tuple, list)) else [results]
    degree = run.group.degree
    final = []
    has_loss = any(_is_loss(run.values[n]) for n in nodes if isinstance(n, Node))
    gathered = outputs is Outputs.GATHERED or (outputs is Outputs.AUTO and not has_loss)
    for n in nodes:
        if not isinstance(n, Node):
            final.append(n)
            continue
        found = run.values[n]
        if isinstance(found, Partial):
            run.values[n] = found = run.group.all_reduce(found.tensor)
        cut = isinstance(found, Sharded) and not gathered and not found.shard.axis.heads
        result = found.tensor if cut else run.whole(n)
        factor = (1.0 if cut else 1 / degree) * (degree if outside else 1)
        if isinstance(result, torch.Tensor) and result.requires_grad and factor != 1:
            result = scale_gradient(result, factor)
        final.append(result)
    return tuple(final) if isinstance(results, (tuple, list)) else final[0]


def _is_loss(found: Any) -> bool:
    x = found.tensor if isinstance(found, Partial) else found
    return isinstance(x, torch.Tensor) and x.dim() == 0 and x.requires_grad


def tell_of_gathers(run: Run) -> None:
    """Logs what every rank holds whole although it was cut: the memory that this costs, and the lines."""
    lines = source_lines(run.collected)
    if lines:
        log.warning(
            "sequence-parallel gathers %d values on every rank, first read at %s%s",
            len(run.collected), lines[0], f" and {len(lines) - 1} more lines" if lines[1:] else "",
        )  # fmt: skip


def _refuse_writes(program: Program) -> None:
    """A cache that is written in place holds the whole sequence, and a rank would write its block."""
    if program.mutated:
        raise UserError(
            f"pass 'sequence-parallel' is for training and for whole prompts; this graph writes to "
            f"'{sorted(program.mutated)[0]}'",
            remedy="use_cache=False, or compile model.forward alone and generate with the original model",
        )
