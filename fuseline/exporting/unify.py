"""Whether a rewritten graph is the model's own graph with other weights, and with which.

Both graphs are walked together from what they return. Wherever the model reads a parameter, the rewritten graph has to
read an expression of the same shape and dtype, which is then the parameter's new value; so nothing is inferred from
names. These differences are allowed beside that:

    norm     rms_norm(x, γ)            rms_norm(x)                    γ was folded away: it becomes neutral
    online   linear(x, W)              linear(x·R, W')                R is left at run time, on a product's input
             attention(q, k, v)        attention(q·R, k·R, v)         or on queries and keys
    codes    linear(x, W)              linear(x, dequantize(W'))      W' is quantized
    rounded  linear(x, W)              linear(round(x), W')           a product's input is rounded at run time
             attention(q, k, v)        attention(q, round(k), round(v))   or keys and values

Any other is a `Mismatch`: something that no values of the parameters can express.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from ..compiler.errors import UserError
from ..compiler.expressions import Expression
from ..compiler.ops import rms_norm
from ..compiler.program import Program
from ..compiler.provenance import makers, module_path, source_line
from ..compiler.schemes import Scheme
from ..compiler.sites import op_name, sites
from ..passes.rotation.carriers import is_attention
from ..passes.rotation.prepare import written_down
from ..passes.rotation.products import product
from .codes import dequantized, rounded
from .rotations import Matrix, peel


class Mismatch(UserError):
    """The rewritten graph computes something that the model's own graph cannot, whatever its parameters are."""


@dataclass(frozen=True)
class Neutral:
    """The value of every element of a norm's weight that was folded into what reads the norm."""

    value: float


@dataclass(frozen=True)
class Use:
    """One place where the model reads a weight; value: what the rewritten graph reads there."""

    site: str
    module: str
    weight: Expression
    value: Expression | Neutral


@dataclass(frozen=True)
class Online:
    """A rotation at run time: of a product's input (weight is the product's), or of queries and keys (None)."""

    site: str
    module: str
    matrix: Matrix
    weight: Expression | None


@dataclass(frozen=True)
class RoundedInput:
    """The input of a product with `weight`, rounded at run time."""

    site: str
    weight: Expression
    scheme: Scheme


@dataclass(frozen=True)
class RoundedCache:
    """Keys and values of an attention, rounded at run time; channels: of a key and of a value."""

    site: str
    module: str
    keys: Scheme | None
    values: Scheme | None
    channels: tuple[int, int]


@dataclass
class Unified:
    """uses: what is read in the place of each weight. The rest is left at run time."""

    uses: list[Use] = field(default_factory=list)
    online: list[Online] = field(default_factory=list)
    inputs: list[RoundedInput] = field(default_factory=list)
    caches: list[RoundedCache] = field(default_factory=list)
    attentions: int = 0


def unify(model: Program, rewritten: Program) -> Unified:
    """Walks both graphs together.

    Raises:
        Mismatch: naming the place, what the model has there, and what the rewritten graph.
    """
    walk = _Walk(model)
    ours, theirs = _roots(model), _roots(rewritten)
    if len(ours) != len(theirs):
        raise Mismatch("a pass added or removed operations that write to memory, which no parameter can express")
    walk.pairs([*zip(ours, theirs, strict=True)])
    order = {site: i for i, site in enumerate(walk.sites.values())}
    walk.found.uses.sort(key=lambda use: order[use.site])
    walk.found.online.sort(key=lambda one: order[one.site])
    return walk.found


def _roots(program: Program) -> list[Node]:
    """What is computed for its own sake: results, and writes."""
    return [n for n in program.graph.nodes if n.op == "output" or (n.op != "placeholder" and n.is_impure())]


class _Walk:
    def __init__(self, model: Program):
        self.sites = sites(model.graph)
        self.found = Unified()

    def pairs(self, pending: list[tuple[Node, Node]]) -> None:
        seen: set[tuple[Node, Node]] = set()
        while pending:
            pair = pending.pop()
            if pair not in seen:
                seen.add(pair)
                pending += self._node(*pair)

    def _node(self, ours: Node, theirs: Node) -> list[tuple[Node, Node]]:
        """Compares two calls; the pairs of nodes that their arguments are."""
        (target, args, named), (other_target, other_args, other_named) = written_down(ours), written_down(theirs)
        if ours.op != theirs.op or (ours.op != "output" and target != other_target):
            raise self._mismatch(ours, theirs)
        if ours.op in ("placeholder", "get_attr"):
            return []
        mine, other = list(args), list(other_args)
        if ours.target is rms_norm.overload:
            mine, other = self._norm(ours, mine, other)
        elif is_attention(ours):
            self._keys_and_values(ours, other)
            self._queries(ours, theirs, other)
        elif (made := product(ours)) is not None:
            if len(other) > len(mine):  # `quantize` writes an absent bias out
                mine += [None] * (len(other) - len(mine))
            position = next(i for i, a in enumerate(mine) if a is made.x and i != made.position)
            whole = rounded(other[position])
            if whole is not None:
                other[position] = whole.x
                self.found.inputs.append(RoundedInput(self.sites[ours], made.expression, whole.scheme))
            found = peel(other[position])
            if found is not None and peel(mine[position]) is None:
                other[position] = found.x
                self.found.online.append(Online(self.sites[ours], module_path(ours), found.matrix, made.expression))
        if len(mine) != len(other) or named.keys() != other_named.keys():
            raise self._mismatch(ours, theirs)
        both = [*zip(mine, other, strict=True), *((named[k], other_named[k]) for k in named)]
        return [pair for a, b in both for pair in self._argument(ours, theirs, a, b)]

    def _argument(self, ours: Node, theirs: Node, a: Any, b: Any) -> Iterator[tuple[Node, Node]]:
        if isinstance(a, Node) and isinstance(b, Node):
            value = b.meta.get("weight") or dequantized(b)
            if "weight" in a.meta or value is not None:
                self._weight(ours, theirs, a, b, value)
            else:
                yield a, b
        elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                yield from self._argument(ours, theirs, x, y)
        elif isinstance(a, Node) or isinstance(b, Node) or a != b:
            raise self._mismatch(ours, theirs)

    def _weight(self, ours: Node, theirs: Node, a: Node, b: Node, value: Expression | None) -> None:
        kinds = [(n.meta["val"].shape, n.meta["val"].dtype) for n in (a, b)]
        if "weight" not in a.meta or value is None or kinds[0] != kinds[1]:
            raise self._mismatch(ours, theirs)
        self._use(ours, a, value)

    def _use(self, ours: Node, weight: Node, value: Expression | Neutral) -> None:
        self.found.uses.append(Use(self.sites[ours], module_path(ours), weight.meta["weight"], value))

    def _norm(self, ours: Node, mine: list[Any], other: list[Any]) -> tuple[list[Any], list[Any]]:
        """The arguments of a norm whose weight was folded away, without weight and offset."""
        if mine[1] is None or other[1] is not None:
            return mine, other
        full = [[*args, *(False, None, True)[len(args) - 3 :]] for args in (mine, other)]
        self._use(ours, mine[1], Neutral(0.0 if full[0][3] else 1.0))
        kept = [[a for i, a in enumerate(args) if i not in (1, 3)] for args in full]
        return kept[0], kept[1]

    def _keys_and_values(self, ours: Node, other: list[Any]) -> None:
        self.found.attentions += 1
        both = [rounded(x) for x in other[1:3]]
        channels = [int(x.meta["val"].shape[-1]) for x in other[1:3]]
        for at, one in enumerate(both, start=1):
            if one is not None:
                other[at] = one.x
        keys, values = (None if one is None else one.scheme for one in both)
        if keys or values:
            self.found.caches.append(
                RoundedCache(self.sites[ours], module_path(ours), keys, values, (channels[0], channels[1]))
            )

    def _queries(self, ours: Node, theirs: Node, other: list[Any]) -> None:
        found = [peel(x) for x in other[:2]]
        if found[0] is None and found[1] is None:
            return
        if found[0] is None or found[1] is None or found[0].matrix != found[1].matrix:
            raise self._mismatch(ours, theirs)
        other[:2] = [one.x for one in found if one is not None]
        self.found.online.append(Online(self.sites[ours], module_path(ours), found[0].matrix, None))

    def _mismatch(self, ours: Node, theirs: Node) -> Mismatch:
        where = self.sites.get(ours, ours.name)
        made = next((m for m in reversed(makers(theirs)) if m not in makers(ours)), "the passes")
        found = peel(theirs)
        what = f"a rotation by {found.matrix} at run time" if found is not None else _described(theirs)
        line = source_line(ours)
        return Mismatch(
            f"a plain checkpoint cannot hold what the passes made of {where}",
            [
                f"the model:     {_described(ours)}{f', {line}' if line else ''}",
                f"after {made}: {what}",
                "values of its parameters cannot make the one of the other",
            ],
        )


def _described(node: Node) -> str:
    """`linear(add, weight)`: an op and what its operands are."""
    if node.op != "call_function":
        return node.op
    operands = ("weight" if "weight" in n.meta else op_name(n) if n.op == "call_function" else n.name for n in node.args
                if isinstance(n, Node))  # fmt: skip
    return f"{op_name(node)}({', '.join(operands)})"
