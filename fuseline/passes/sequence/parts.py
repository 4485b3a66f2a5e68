"""Batches that arrive cut, `inputs=sharded`: each rank is given its own positions, in order, as many on every rank.

What holds the sequence (token ids, labels, positions, a padding mask, embedded tokens) is gathered as the graph begins,
and the program runs on with lengths of the whole: a shift of labels crosses the borders, positions that the model
counts itself go on from one rank to the next. Whole numbers are small; embedded tokens are gathered too, and each rank
goes on with its own. The rest is what the pass does with whole batches.

The length has to be a symbol in the graph: a number would stand for a rank's part in some places, and for something
else in others. The backend asks Dynamo for that before it captures the graph (`compiler/lengths.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ...compiler.compat import known_size, size_hint, symbolic_expression
from ...compiler.errors import UserError
from ...compiler.ops import scale_gradient
from ...compiler.program import Program
from .collectives import Group
from .placement import Axis, Shard
from .retrace import Again, retrace
from .sites import Site, inputs, trace_back

REMEDY = (
    "torch._dynamo.mark_dynamic(tensor, dim) on what holds the sequence, or torch.compile(…, dynamic=True); "
    "or inputs=full"
)


def gathered(program: Program, sites: Sequence[Site], group: Group, outside: bool) -> Program:
    """The program of the whole sequence, whose inputs are each rank's own part.

    outside: whether a wrapper averages gradients, which those of the caller's tensors are scaled against.

    Raises:
        UserError: no input holds the sequence, its length is a number in this graph, or an input holds it twice.
    """
    part = _length(program, sites)
    length = symbolic_expression(part)
    dims = {n: _dim(n, part) for n in program.placeholders if isinstance(n.meta["val"], torch.Tensor)}

    def arriving(node: Node, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value * group.degree if symbolic_expression(value) == length else value
        dim = dims[node]
        if dim is None:
            return value
        if value.requires_grad and outside:
            value = scale_gradient(value, 1 / group.degree)
        size = value.shape[dim]
        return group.gather(value, Shard(dim, Axis(size * group.degree, size, group.degree, True)))

    def on_whole(values: Sequence[Any], weights: dict[Node, torch.Tensor]) -> Any:
        given = [arriving(n, v) for n, v in zip(program.placeholders, values, strict=True)]
        return Again(program, weights).run(*given)

    return replace(program, module=retrace(program, on_whole))


def holds_sequence(program: Program, sites: Sequence[Site]) -> dict[Node, int]:
    """The inputs that lead to attention's positions, and the dimension along which they hold them."""
    whole = lambda size: Axis(size, size, 1, True)
    return inputs(trace_back(list(sites), whole))


def _length(program: Program, sites: Sequence[Site]) -> Any:
    """A part's length, a symbol."""
    found = holds_sequence(program, sites)
    if not found:
        raise UserError(
            "pass 'sequence-parallel' was told inputs=sharded, and no input of this graph holds the sequence",
            ["attention's positions are followed back to the inputs; none of them has one element a position"],
            "inputs=full, with the whole batch on every rank",
        )
    sizes = {n: n.meta["val"].shape[d] for n, d in found.items()}
    for node, size in sizes.items():
        number = known_size(size)
        if number is not None:
            squares = [n.name for n in program.placeholders
                       if isinstance(v := n.meta["val"], torch.Tensor) and list(v.shape).count(number) > 1]  # fmt: skip
            raise UserError(
                f"pass 'sequence-parallel' was told inputs=sharded, and the length of '{node.name}' is the number "
                f"{number} in this graph",
                ["a graph for one length says nothing of the whole sequence's",
                 *(f"'{name}' has that size twice, which may have fixed it" for name in squares)],
                REMEDY,
            )  # fmt: skip
    expressions = {symbolic_expression(size) for size in sizes.values()}
    if len(expressions) > 1 or not next(iter(expressions)).is_Symbol:
        raise UserError(
            "pass 'sequence-parallel' was told inputs=sharded, and finds no single length in this graph",
            [f"{n.name}: {symbolic_expression(size)}" for n, size in sizes.items()],
            "inputs=full, with the whole batch on every rank",
        )
    return next(iter(sizes.values()))


def _dim(node: Node, part: Any) -> int | None:
    """Along which dimension an input is a part of the sequence, whose length is `part`."""
    length = symbolic_expression(part)
    found = [d for d, size in enumerate(node.meta["val"].shape) if _reads(size, length)]
    if not found:
        others = [d for d, size in enumerate(node.meta["val"].shape) if d and size_hint(size) == size_hint(part, 0)]
        if others:
            raise UserError(
                f"pass 'sequence-parallel' was told inputs=sharded, and dimension {others[0]} of '{node.name}' is as "
                "long as a part of the sequence, but is not known to be one",
                [f"its size in this graph: {symbolic_expression(node.meta['val'].shape[others[0]])}"],
                REMEDY,
            )
        return None
    if len(found) > 1 or symbolic_expression(node.meta["val"].shape[found[0]]) != length:
        sizes = ", ".join(str(symbolic_expression(s)) for s in node.meta["val"].shape)
        raise UserError(
            f"pass 'sequence-parallel' was told inputs=sharded, and '{node.name}' [{sizes}] is no part of a sequence "
            "along one dimension",
            ["which rows and columns of the whole a rank's own are cannot be told from that"],
            "a padding mask [batch, length], or inputs=full",
        )
    return found[0]


def _reads(size: Any, length: Any) -> bool:
    return known_size(size) is None and length in symbolic_expression(size).free_symbols
