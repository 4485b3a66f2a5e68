"""Correspondence: which value of the captured program each node of a rewritten one must have.

A node that nobody touched must have its own; what a rewrite puts in a node's place must have that node's. Nothing else
is claimed: nodes inside of a rewrite have no counterpart. A region is a copy of the nodes that it takes, which is
checked node by node; where it is none, only its results are claimed.

For each rewrite there are `Job`s: the computation that was there and the one that it has put there, from the nearest
values that are claimed themselves. They are written down around the rewrite, so it is charged neither with what later
passes do to its nodes nor with what earlier ones did.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..action import Action, Observer
from ..framework import Pass
from ..program import Program
from ..provenance import source_line
from .cells import Cell, Flat, Fragment, cell_of, flatten, upwards

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..report import Report


@dataclass(frozen=True)
class Rewrite:
    """One rewrite, or one edit.

    line: the user's; location: `file:line` of the rule; moved: its nodes are copies; details: an edit's call, as it was
    and as it is.
    """

    number: int
    pass_name: str
    rule: str
    site: str
    location: str | None
    line: str | None
    lossy: bool = False
    moved: bool = False
    details: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"#{self.number} {self.pass_name}/{self.rule} at {self.site}"


@dataclass(eq=False)
class Job:
    """What a rewrite computes in the place of what was there before, both from the nearest values that are claimed.

    captured: the cell whose value this is to be, where one is known.
    """

    rewrite: Rewrite
    name: str
    before: Fragment
    after: Fragment
    captured: Cell | None = None


@dataclass(frozen=True)
class Claim:
    """A node's value must be that of `cell`; `rewrites`: those that this rests on, the last one last."""

    cell: Cell
    rewrites: tuple[Rewrite, ...] = ()


@dataclass
class Claims:
    """What is known of a rewritten program: a captured program, claims by node, jobs, and who made a node."""

    captured: Flat
    of: dict[Node, list[Claim]] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    makers: dict[Node, Rewrite] = field(default_factory=dict)
    rewrites: list[Rewrite] = field(default_factory=list)

    def build(self, nodes: Iterable[Node], through: Collection[Node] = ()) -> dict[Node, Fragment]:
        """The computations of some nodes from claimed values; those of `through` are looked into, claimed or not."""
        cells: dict[Node, Cell] = {}
        found: dict[Node, Fragment] = {}
        for node in nodes:
            pending = [(node, False)]
            while pending:
                current, ready = pending.pop()
                known = self.of.get(current)
                if current in cells:
                    continue
                if current.op == "get_attr":
                    cells[current] = cell_of(current, "", None, cells.__getitem__)
                elif known and (current not in through or current.op == "placeholder"):
                    cells[current] = Cell(current.name, "reference", known[0].cell, current)
                elif ready:
                    owner = current.graph.owning_module
                    module = owner.get_submodule(str(current.target)) if owner and current.op == "call_module" else None
                    cells[current] = cell_of(current, "", None, cells.__getitem__, module)
                else:
                    pending.append((current, True))
                    pending += [(n, False) for n in current.all_input_nodes]
            found[node] = Fragment(upwards(cells[node], lambda cell: False), cells[node])
        return found

    def claim(self, node: Node, cell: Cell, rewrites: tuple[Rewrite, ...]) -> None:
        """From now on the node has the cell's value; what is known of it already stays."""
        if all(known.cell is not cell for known in self.of.get(node, ())):
            self.of[node] = [*self.of.get(node, ()), Claim(cell, rewrites)]


class Correspondence(Observer):
    """Follows the rewrites of one pipeline; `claims` holds what is known at its end, `program` the result.

    stages: copies of the program, after each pass but the last.
    """

    claims: Claims
    program: Program

    def pipeline_starts(self, pipeline: Pipeline, program: Program) -> None:
        captured = program.copy()
        self.claims = Claims(flatten(captured))
        of = self.claims.captured.of
        for node, original in zip(program.graph.nodes, captured.graph.nodes, strict=True):
            if isinstance(of.get(original), Cell):
                self.claims.of[node] = [Claim(of[original])]
        for cell in self.claims.captured.cells:
            if cell.region and cell.node is not None:
                self.claims.of[cell.node] = [Claim(cell)]
        self.stages: list[Program] = []
        self._started = self._lossy = False

    def pass_starts(self, step: Pass, program: Program) -> None:
        if self._started:
            self.stages.append(program.copy())
        self._started = True
        self._lossy = step.tier.value == "lossy"

    def allows(self, action: Action) -> bool:
        nodes = dict.fromkeys((*action.removed, action.root))
        self._before = {n: (n.target, n.args, n.kwargs) for n in nodes}
        self._fragments = self.claims.build(nodes, nodes)
        self._line = source_line(action.root)
        return True

    def rewritten(self, action: Action, program: Program) -> None:
        claims = self.claims
        copies = self._copies(action, program)
        rewrite = Rewrite(
            action.number, action.pass_name, action.rule, action.site, action.location, self._line, self._lossy,
            copies is not None,
        )  # fmt: skip
        claims.rewrites.append(rewrite)
        if copies is not None:
            for old, new in [*copies.items(), *action.replaced.items()]:
                if old in claims.of:
                    claims.of[new] = claims.of[old]
                if old in claims.makers:
                    claims.makers[new] = claims.makers[old]
            return
        claims.makers.update(dict.fromkeys(action.created, rewrite))
        after = claims.build(action.replaced.values())
        for old, new in action.replaced.items():
            known = claims.of.get(old, [])
            cell = known[0].cell if known else None
            before = self._fragments.get(old)
            if before is None and cell is not None:
                start = Cell(old.name, "reference", cell, old)
                before = Fragment([start], start)
            if before is not None:
                claims.jobs.append(Job(rewrite, new.name, before, after[new], cell))
        for old, new in action.replaced.items():
            for claim in claims.of.get(old, ()):
                claims.claim(new, claim.cell, (*claim.rewrites, rewrite))

    def pipeline_ends(self, program: Program, report: Report) -> None:
        self.program = program

    def _copies(self, action: Action, program: Program) -> dict[Node, Node] | None:
        """Old node → its copy in the region that was cut out, where the action has done nothing but that.

        The region's arguments are its inputs; each of its nodes must have the op and the arguments of the node that it
        is a copy of, and its results must stand for the nodes that they are copies of.
        """
        calls = [n for n in action.created if n.op == "call_module"]
        if len(calls) != 1 or not all(n in self._before for n in action.removed):
            return None
        call, inner = calls[0], program.module.get_submodule(str(calls[0].target))
        if not isinstance(inner, GraphModule):
            return None
        inputs = [n for n in inner.graph.nodes if n.op == "placeholder"]
        body = [n for n in inner.graph.nodes if n.op not in ("placeholder", "output")]
        if len(inputs) != len(call.args) or len(body) != len(action.removed):
            return None
        of: dict[Node, Any] = dict(zip(inputs, call.args, strict=True))
        for old, new in zip(action.removed, body, strict=True):
            if not _alike(self._before[old], new, of):
                return None
            of[new] = old
        output = inner.graph.output_node().args[0]
        results = output if isinstance(output, tuple) else (output,)
        picked = [call] if not isinstance(output, tuple) else [n for n in action.created if call in n.all_input_nodes]
        stand_for = {new: of[result] for new, result in zip(picked, results, strict=False)}
        if any(stand_for.get(new) is not old for old, new in action.replaced.items()):
            return None
        if any(n is not call and n.args != (call, i) for i, n in enumerate(picked)):
            return None
        return dict(zip(action.removed, body, strict=True))


def _alike(before: tuple[Any, Any, Any], new: Node, of: dict[Node, Any]) -> bool:
    """Whether a node of a region is a copy of a node as it was: the same op on the same values."""
    target, args, kwargs = before
    if new.target is not target:
        return False
    return bool(map_arg((new.args, new.kwargs), of.__getitem__) == (args, kwargs))
