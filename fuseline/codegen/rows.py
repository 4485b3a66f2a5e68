"""Reductions, softmax and their relatives over the last dimension: `RULES[overload](tile, node, index, mask)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compiler.traits import arguments, is_last_dim_reduction, overloads
from .call import Unsupported, dtype_of
from .dtypes import cast, compute_dtype, literal
from .formulas import divide
from .sizes import Size, shape
from .tile import Tile
from .values import Index, Mask, Term

Rule = Callable[[Tile, torch.fx.Node, Index, Mask], Term]
RULES: dict[Any, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads(names), function))
        return function

    return register


def element(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask, compute: torch.dtype) -> Term:
    """An operand's value as the compute type `compute`."""
    term = tile.value(node, index, mask)
    text = cast(term.text, compute_dtype(dtype_of(node)), compute)
    return term if text == term.text else tile.bind(f"{node.name}_wide", text, term.axes)


def as_number(tile: Tile, length: Size, compute: torch.dtype) -> str:
    """A row's length as a floating-point number."""
    if isinstance(length, int):
        return literal(length, compute)
    return cast(f"tl.full((), {tile.size(length)}, tl.int64)", torch.int64, compute)


class Row:
    """The rows of `source` seen from one index: reductions over them, each written once."""

    def __init__(self, tile: Tile, name: str, source: torch.fx.Node, outer: Index, mask: Mask, compute: torch.dtype):
        self.tile, self.name, self.source, self.outer, self.mask = tile, name, source, outer, mask
        self.compute, self.length = compute, shape(source)[-1]

    def at(self, column: Term, mask: Mask) -> Term:
        return element(self.tile, self.source, (*self.outer, column), mask, self.compute)

    def reduce(self, how: str, suffix: str, of: Callable[[Term, Mask], Term] | None = None) -> Term:
        """ "sum", "max" or "min" of `of(column, mask)`, by default of the source's elements."""
        return self.tile.reduce(
            f"{self.name}_{suffix}", how, self.length, self.outer, self.mask, self.compute, of or self.at
        )

    def mean(self, suffix: str = "mean", of: Callable[[Term, Mask], Term] | None = None) -> Term:
        total = self.reduce("sum", "sum", of)
        text = divide(total.text, as_number(self.tile, self.length, self.compute), self.compute)
        return self.tile.bind(f"{self.name}_{suffix}", text, total.axes)

    def squared_deviation(self, mean: Term) -> Callable[[Term, Mask], Term]:
        def of(column: Term, mask: Mask) -> Term:
            term = self.at(column, mask)
            axes = term.axes | mean.axes
            centred = self.tile.bind(f"{self.name}_centred", f"{term.text} - {mean.text}", axes)
            return self.tile.bind(f"{self.name}_squared", f"{centred.text} * {centred.text}", axes)

        return of

    def extremum(self, how: str) -> Term:
        """The row's maximum or minimum; not a number where one element is not, which `tl.max` would pass over."""
        best = self.reduce(how, how)
        if not self.compute.is_floating_point:
            return best

        def is_nan(column: Term, mask: Mask) -> Term:
            term = self.at(column, mask)
            text = f"({term.text} != {term.text}).to(tl.int32)"
            return self.tile.bind(f"{self.name}_is_nan", text, term.axes)

        count = self.tile.reduce(
            f"{self.name}_nans", "max", self.length, self.outer, self.mask, torch.int32, is_nan
        )  # fmt: skip
        text = f"tl.where({count.text} > 0, {literal(float('nan'), self.compute)}, {best.text})"
        return self.tile.bind(self.name, text, best.axes)

    def exponential_sum(self, largest: Term) -> Term:
        def of(column: Term, mask: Mask) -> Term:
            return self.exponential(self.at(column, mask), largest)

        return self.reduce("sum", "sum", of)

    def exponential(self, term: Term, largest: Term) -> Term:
        return self.tile.bind(
            f"{self.name}_exp", f"tl.exp({term.text} - {largest.text})", term.axes | largest.axes
        )  # fmt: skip


def _row(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask, compute: torch.dtype) -> Row:
    if not is_last_dim_reduction(node):
        raise Unsupported("it reduces over other dimensions than the last")
    source = node.args[0]
    assert isinstance(source, torch.fx.Node)
    rank = source.meta["val"].dim()
    return Row(tile, node.name, source, tuple(index[: rank - 1]), mask, compute)


@rule("sum.default sum.dim_IntList mean.default mean.dim amax.default amin.default")
def _reduction(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    kind = node.target._opname  # type: ignore[union-attr]
    compute = compute_dtype(dtype_of(node))
    if compute == torch.bool:
        compute = torch.int32  # Triton compares integers, not truth values
    row = _row(tile, node, index, mask, compute)
    if kind == "mean":
        return row.mean()
    if kind == "sum":
        return row.reduce("sum", "total")
    best = row.extremum("max" if kind == "amax" else "min")
    if dtype_of(node) != torch.bool:
        return best
    return tile.bind(node.name, cast(best.text, torch.int32, torch.bool), best.axes)


@rule("var.correction var.dim")
def _variance(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    given = arguments(node)
    correction = given.get("correction", 1 if given.get("unbiased", True) else 0)
    correction = 1 if correction is None else correction
    compute = compute_dtype(dtype_of(node))
    row = _row(tile, node, index, mask, compute)
    total = row.reduce("sum", "squares", row.squared_deviation(row.mean()))
    count = as_number(tile, row.length, compute)
    count = tile.bind("count", f"{count} - {literal(correction, compute)}").text if correction else count
    if isinstance(row.length, int) and row.length <= correction:
        raise Unsupported("the variance has no degree of freedom")
    return tile.bind(node.name, divide(total.text, count, compute), total.axes)


@rule("softmax.int _softmax.default log_softmax.int _log_softmax.default logsumexp.default")
def _softmax(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """exp(x − max) / Σ exp(x − max), its logarithm, or the logarithm of the sum."""
    kind = node.target._opname.removeprefix("_")  # type: ignore[union-attr]
    compute = compute_dtype(dtype_of(node))
    row = _row(tile, node, index, mask, compute)
    largest = row.reduce("max", "max")
    if kind == "logsumexp":
        # an infinite maximum would give inf − inf
        infinite = f'tl.abs({largest.text}) == float("inf")'
        shift = tile.bind(
            f"{node.name}_shift", f"tl.where({infinite}, {literal(0, compute)}, {largest.text})", largest.axes
        )
        total = row.exponential_sum(shift)
        return tile.bind(node.name, f"tl.log({total.text}) + {shift.text}", total.axes | shift.axes)
    total = row.exponential_sum(largest)
    term = row.at(index[-1], mask)
    axes = term.axes | total.axes
    if kind == "softmax":
        return tile.bind(node.name, divide(row.exponential(term, largest).text, total.text, compute), axes)
    return tile.bind(node.name, f"({term.text} - {largest.text}) - tl.log({total.text})", axes)


@rule("_softmax_backward_data.default")
def _softmax_backward(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """y·(g − Σ g·y)."""
    compute = compute_dtype(dtype_of(node))
    row = _row(tile, node, index, mask, compute)
    output = arguments(node)["output"]

    def of(column: Term, inner: Mask) -> Term:
        g, y = row.at(column, inner), element(tile, output, (*row.outer, column), inner, compute)
        return tile.bind(f"{node.name}_product", f"{g.text} * {y.text}", g.axes | y.axes)

    total = row.reduce("sum", "sum", of)
    g, y = row.at(index[-1], mask), element(tile, output, index, mask, compute)
    return tile.bind(node.name, f"{y.text} * ({g.text} - {total.text})", g.axes | y.axes | total.axes)
