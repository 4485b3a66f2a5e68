"""Two programs that were not made from one another here: what was edited, and what each edit does.

A pair of nodes that computes the same thing from paired inputs needs no look; each other one is an *edit*, and is
measured as a rewrite is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.node import map_aggregate

from ..errors import UserError
from ..program import Program
from ..provenance import module_path, source_line
from ..sites import op_name
from .cells import Cell, Flat, Fragment, flatten, upwards
from .compare import inputs_of
from .comparison import Comparison
from .correspondence import Claim, Claims, Job, Rewrite
from .measure import Progress, measure
from .pairing import namesakes, pair


def compare_programs(before: Program, after: Program, progress: Progress | None = None) -> Comparison:
    """Measures the second program, node by node, against the first one in float64, both on the first one's inputs.

    Raises:
        UserError: there are no inputs, or the programs don't take or return as many.
    """
    first, second = flatten(before), flatten(after)
    _same_signature(first, second)
    flat, theirs = inputs_of(before), inputs_of(after)
    named = namesakes(first, second)
    pairs = pair(first, second, named)
    for b, a in pairs.items():
        if b.kind == "input":
            theirs[b.target] = flat[a.target]
    claims = Claims(first, {b.node: [Claim(a)] for b, a in pairs.items() if b.node is not None})
    _Edits(claims, second, pairs, named or {}, flat, theirs).note()
    return measure(claims, second, flat, theirs, progress)


def _same_signature(first: Flat, second: Flat) -> None:
    inputs, results = (
        [[c for c in flat.cells if c.kind == "input"] for flat in (first, second)],
        [flat.results for flat in (first, second)],
    )
    for what, (one, other) in (("inputs", inputs), ("results", results)):
        if len(one) != len(other):
            raise UserError(
                f"the programs have {len(one)} and {len(other)} {what}: they cannot be compared node by node",
                remedy="two stages of one dump, or a model and a stage of it",
            )


class _Edits:
    """Notes edits in `claims`.

    Args:
        pairs: cells of the second program → those of the first that they must equal.
        named: the same by name alone, whatever their shapes.
        flat, after_flat: the programs' arguments, parameters among them.
    """

    def __init__(
        self,
        claims: Claims,
        after: Flat,
        pairs: dict[Cell, Cell],
        named: dict[Cell, Cell],
        flat: Sequence[Any],
        after_flat: Sequence[Any],
    ):
        self.claims, self.after, self.pairs, self.named = claims, after, pairs, named
        self.flat, self.after_flat = flat, after_flat
        self.taken = set(pairs.values())

    def note(self) -> None:
        """A job for each pair that may differ, and for each result that is another node's."""
        for cell, stands_for in self.pairs.items():
            if cell.kind == "weight" and not self._same_weight(stands_for, cell):
                self._edit(stands_for, cell, "weight", Fragment([cell], cell))
            elif cell.kind == "call" and not _same(stands_for, cell, self.pairs):
                self._edit(stands_for, cell, op_name(cell.node) if cell.node else cell.name, self._made_of(cell))
        for a, b in zip(self.claims.captured.results, self.after.results, strict=True):
            if isinstance(a, Cell) and isinstance(b, Cell) and self.pairs.get(b) is not a:
                self._edit(a, b, "result", self._made_of(b, top=False))

    def _edit(self, stands_for: Cell, cell: Cell, rule: str, after: Fragment) -> None:
        edited = self._edited(cell, after) if rule != "result" else cell
        was, node = self.named.get(edited, stands_for), edited.node
        edit = Rewrite(
            len(self.claims.rewrites) + 1, "edit", rule, module_path(node) if node is not None else "", None,
            source_line(node) if node is not None else None, details=(_text(was), _text(edited)),
        )  # fmt: skip
        self.claims.rewrites.append(edit)
        before = Fragment(self._replaced(stands_for), stands_for)
        self.claims.jobs.append(Job(edit, edited.name, before, after, stands_for))

    def _edited(self, cell: Cell, after: Fragment) -> Cell:
        """The node that was edited, where it is one that got another shape and has no counterpart for that reason."""
        inside = {c.node for c in after.cells if c.kind == "call"}
        for other, was in self.named.items():
            if other.node in inside and other.kind == "call" and not _same(was, other, self.named):
                return other
        return cell

    def _same_weight(self, a: Cell, b: Cell) -> bool:
        if a.target != b.target or isinstance(a.target, str):
            return False
        for name in a.target.parameters():
            x = self.flat[self.claims.captured.program.sources[name].index]
            y = self.after_flat[self.after.program.sources[name].index]
            if x is not y and not (x.dtype == y.dtype and torch.equal(x, y)):
                return False
        return True

    def _made_of(self, cell: Cell, top: bool = True) -> Fragment:
        """What a cell of the second program computes, from cells that are paired."""
        paired = lambda c: c in self.pairs and c.kind != "weight" and not (top and c is cell)
        copies: dict[Cell, Cell] = {}
        for source in upwards(cell, paired):
            if source.kind == "weight":
                copies[source] = source
            elif paired(source):
                copies[source] = Cell(source.name, "reference", self.pairs[source], source.node)
            else:
                args, kwargs = map_aggregate(
                    (source.args, source.kwargs), lambda x: copies[x] if isinstance(x, Cell) else x
                )
                copies[source] = Cell(source.name, source.kind, source.target, source.node, args, kwargs).read()
        return Fragment(list(copies.values()), copies[cell])

    def _replaced(self, cell: Cell) -> list[Cell]:
        """A cell of the first program, and those before it that the second one has not."""
        stays = lambda c: c.kind != "call" or (c in self.taken and c is not cell)
        return [c for c in upwards(cell, stays) if not stays(c)]


def _same(a: Cell, b: Cell, pairs: dict[Cell, Cell]) -> bool:
    """Whether two cells are the same call of paired inputs."""
    mapped = map_aggregate((b.args, b.kwargs), lambda x: pairs.get(x) if isinstance(x, Cell) else x)
    return a.target == b.target and _plain(mapped) == _plain((a.args, a.kwargs))


def _plain(value: Any) -> Any:
    """Arguments as tuples, each literal with its type: 2 is not 2.0."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple(sorted((k, _plain(v)) for k, v in value.items()))
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


def _text(cell: Cell) -> str:
    """`mean(pow_38, [-1], True)`."""
    if cell.kind != "call":
        return f"{cell.kind} {cell.name}"
    shown = [_argument(a) for a in cell.args] + [f"{k}={_argument(v)}" for k, v in cell.kwargs.items()]
    return f"{op_name(cell.node) if cell.node else cell.name}({', '.join(shown)})"


def _argument(value: Any) -> str:
    if isinstance(value, Cell):
        return value.name
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_argument, value))}]"
    return str(value)
