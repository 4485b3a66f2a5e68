"""Proving what an attention mask is: causal, sliding, padded, or none of these.

The mask's predicate "query q sees key k" is read from the graph as a formula (`compiler/index_reader`), split into the
part that knows positions and the part that reads data. The first must be equivalent to `k ≤ q + offset` or to
`q + offset − window < k ≤ q + offset`, for every index and every size that the program allows; the second may depend on
the batch and the key only. What is not proved stays a mask argument.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ...compiler.index_algebra import (
    FALSE,
    TRUE,
    All,
    AtLeast,
    Element,
    Formula,
    Holds,
    Linear,
    Value,
    Variable,
    apply,
    both,
    choose,
    is_formula,
    is_opaque,
    literals,
    variables,
)
from ...compiler.index_reader import ZERO, Opaque, Reader, Unreadable, is_one
from ...compiler.program import Program

LOWEST = -1e30


@dataclass(frozen=True)
class Mask:
    """A mask as a model applies it.

    node: boolean (True where visible), or additive; None where every key is visible.
    fill: the mask is boolean, and this number takes the logits' place where it is True (with `shows`: False).
    """

    node: Node | None
    fill: float | None = None
    dtype: torch.dtype = torch.float32  # of the logits
    shows: bool = False

    @property
    def boolean(self) -> bool:
        return self.node is not None and self.fill is None and self.node.meta["val"].dtype == torch.bool


@dataclass(frozen=True)
class Claim:
    """What a mask was proved to be: `kind`, `offset` and `window` of `fuseline::attention`, and its padding part."""

    kind: str
    offset: Linear = ZERO
    window: Linear = ZERO
    padding: tuple[Node, bool] | None = None  # a node of shape [B, T] … [B, 1, 1, T], and whether True is visible


@dataclass
class _Axes:
    b: Linear
    q: Linear
    k: Linear
    index: tuple[Linear, ...]
    batch: Any
    keys: Any


class Masks:
    """Claims about the masks of one program; a mask shared by all layers is proved once."""

    def __init__(self, program: Program):
        self.program, self.reader = program, Reader(program)
        self._claims: dict[Any, Claim | str] = {}

    def claim(self, mask: Mask, q: torch.Tensor, k: torch.Tensor) -> Claim | str:
        """What the mask is for queries q [B, H, S, D] and keys k [B, h, T, D], or why that is not known."""
        if mask.node is None:
            return Claim("full")
        sizes = tuple(str(s) for s in (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
        key = (mask, sizes)
        if key not in self._claims:
            try:
                self._claims[key] = self._prove(mask, q, k)
            except Opaque:
                self._claims[key] = "the mask's elements are computed from data"
            except Unreadable as node:
                self._claims[key] = f"'{node}' is written in place"
        return self._claims[key]

    def _prove(self, mask: Mask, q: torch.Tensor, k: torch.Tensor) -> Claim | str:
        axes = self._axes(mask.node, q, k)
        formula = self._visible(mask, axes)
        if isinstance(formula, str):
            return formula
        formula = self.reader.prover.simplify(formula)
        if formula == FALSE:
            return "the mask hides every key"
        parts = formula.parts if isinstance(formula, All) else (formula,)
        positions = both(*(p for p in parts if not is_opaque(p)))
        data = both(*(p for p in parts if is_opaque(p)))
        found = self._positions(positions, axes)
        if found is None:
            return "the mask depends on positions in another way than causal or sliding"
        claim, certain = found
        if data == TRUE:
            # A finite fill spreads a row that sees nothing over all keys, where the dialect op gives zeros.
            return claim if mask.boolean or certain else "a row may see no key, and the mask adds a finite number there"
        if variables(data) - (axes.b.atoms | axes.k.atoms):
            return "the mask depends on data and on the query or the head"
        if not mask.boolean:
            return "padding may leave a row without a key, and the mask adds a finite number there"
        padding = self._padding(data, axes, mask.node)
        if padding is None:
            return "the padding is no tensor over batch and keys"
        return Claim(claim.kind, claim.offset, claim.window, padding)

    def _axes(self, node: Node, q: torch.Tensor, k: torch.Tensor) -> _Axes:
        shape = node.meta["val"].shape
        keys = k.shape[2] if not shape or is_one(shape[-1]) else shape[-1]
        names = zip("bhqk", (q.shape[0], q.shape[1], q.shape[2], keys), strict=True)
        b, h, i, j = (self.reader.variable(name, size) for name, size in names)
        return _Axes(b, i, j, (b, h, i, j)[4 - len(shape) :], q.shape[0], keys)

    def _visible(self, mask: Mask, axes: _Axes) -> Formula | str:
        value = self.reader.read(mask.node, axes.index)
        if mask.fill is not None:
            then, otherwise = (0.0, mask.fill) if mask.shows else (mask.fill, 0.0)
            value = choose(value, then, otherwise) if is_formula(value) else value
        if not mask.boolean:
            value = apply(lambda v: _visible_number(v, mask.dtype), value)
        return value if is_formula(value) else "the mask adds numbers other than 0 and a dtype's lowest"

    def _positions(self, formula: Formula, axes: _Axes) -> tuple[Claim, bool] | None:
        """The claim that is equivalent to a formula without data, and whether each query surely sees a key."""
        prover = self.reader.prover
        if formula == TRUE:
            return Claim("full"), True
        forms = [x.form for x in literals(formula) if isinstance(x, AtLeast)]
        uppers = [c for f in forms if (c := _bound(f, axes, -1)) is not None]
        lowers = [c for f in forms if (c := _bound(f, axes, 1)) is not None]
        last_query, last_key = self._last(axes.q), self.reader.size(axes.keys) - 1
        # Where the last query sees the last key, no inequality may be left to say so.
        for offset in dict.fromkeys([*uppers, last_key - last_query]):
            inside = AtLeast(axes.q + offset - axes.k)
            if prover.equivalent(formula, both(inside)):
                return Claim("causal", offset), prover.proves(both(AtLeast(offset)))
            for lower in dict.fromkeys(lowers):
                window = offset + lower + 1
                if prover.equivalent(formula, both(inside, AtLeast(axes.k - axes.q + lower))):
                    reached = AtLeast(last_key - last_query - offset + window - 1)
                    certain = prover.proves(both(AtLeast(offset), AtLeast(window - 1), reached))
                    return Claim("sliding", offset, window), certain
        return None

    def _last(self, index: Linear) -> Linear:
        """The largest value that an index takes."""
        return next((self.reader.prover.extent(a) - 1 for a in index.atoms if isinstance(a, Variable)), ZERO)

    def _padding(self, data: Formula, axes: _Axes, mask: Node) -> tuple[Node, bool] | None:
        """A tensor whose elements are the padding: the caller's own, or one that the graph computes on the way."""
        if isinstance(data, Holds) and self._spans(data.element, axes):
            return data.element.node, data.positive
        keys = self.reader.size(axes.keys)
        for node in _ancestors(mask):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor) or value.dtype != torch.bool or value.dim() != 4:
                continue
            batch, heads, queries, width = value.shape
            if not (is_one(heads) and is_one(queries) and self.reader.size(width) == keys and self._fits(batch, axes)):
                continue
            formula = self.reader.read(node, (axes.b, ZERO, ZERO, axes.k))
            if is_formula(formula) and self.reader.prover.equivalent(formula, data):
                return node, True
        return None

    def _spans(self, element: Element, axes: _Axes) -> bool:
        """Whether an element is `node[b, …, k]` with `node` of just that many batches and keys."""
        shape, index = element.node.meta["val"].shape, element.index
        if (
            not 1 <= len(shape) <= 4
            or index[-1] != axes.k
            or self.reader.size(shape[-1]) != self.reader.size(axes.keys)
        ):
            return False
        if any(not is_one(s) for s in shape[1:-1]):
            return False
        return len(shape) == 1 or (self._fits(shape[0], axes) and (is_one(shape[0]) or index[0] == axes.b))

    def _fits(self, batch: Any, axes: _Axes) -> bool:
        return is_one(batch) or self.reader.size(batch) == self.reader.size(axes.batch)


def _visible_number(value: Value, dtype: torch.dtype) -> Value:
    number = float(value.value) if isinstance(value, Linear) and value.value is not None else value
    if number == 0.0:
        return TRUE
    if isinstance(number, float) and hides(number, dtype):
        return FALSE
    raise Opaque


def hides(number: float, dtype: torch.dtype) -> bool:
    """So low that no logit of a model makes up for it: −∞, or near the lowest of the dtype."""
    return number <= (torch.finfo(dtype).min if dtype == torch.float16 else LOWEST)


def _bound(form: Linear, axes: _Axes, sign: int) -> Linear | None:
    """c of `sign·k − sign·q + c ≥ 0`; with a single query, q is 0 and need not appear."""
    key = next(iter(axes.k.atoms), None)
    query = next(iter(axes.q.atoms), None)
    if key is None or form.coefficient(key) != sign:
        return None
    if query is not None and form.coefficient(query) != -sign:
        return None
    rest = form - axes.k * sign + axes.q * sign
    return rest if not variables(rest) and not any(isinstance(a, Element) for a in rest.atoms) else None


def _ancestors(node: Node) -> Iterable[Node]:
    """The nodes that `node` is computed from, nearest first, itself included."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        yield current
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                pending.append(source)
