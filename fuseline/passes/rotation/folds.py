"""Which weights may be replaced by rotated ones: once and for all, or at run time."""

from __future__ import annotations

import torch
from torch.fx import Node

from ...compiler.expressions import Expression, Param
from ...compiler.program import TRAINS, Program

_LOOKUP = torch.ops.aten.embedding.default
THIN = 4
"""How many times longer than wide a weight is that may be rotated at every call."""


class Folds:
    """Says of a weight whether it may: not one that a gradient should reach, and not one that is tied.

    Tied is a table that is looked up in and multiplied by: rotated, it would be two. `untie` allows that.
    """

    def __init__(self, program: Program, untie: bool):
        kept = program.training and TRAINS not in program.state  # there gradients pass through expressions of weights
        self._sources = program.sources if kept else {}
        uses: dict[Expression, set[bool]] = {}
        for node in program.weights():
            uses.setdefault(node.meta["weight"], set()).update(_is_lookup(user, node) for user in node.users)
        self._tied = set() if untie else {weight for weight, looked_up in uses.items() if looked_up == {True, False}}

    def __call__(self, weight: Expression) -> bool:
        return weight not in self._tied and not self.trained(weight)

    def trained(self, weight: Expression) -> bool:
        """Whether a gradient should reach it."""
        return any(self._sources[n].trainable for n in weight.parameters() if n in self._sources)

    def turns(self, weight: Expression) -> bool:
        """Whether it folds, or is one that a gradient should reach and that is cheap to rotate at every call: thin, as
        the matrices of a low-rank adapter are. The gradient then passes through the rotation."""
        if self(weight):
            return True
        if not isinstance(weight, Param) or weight in self._tied:
            return False
        shape = self._sources[weight.name].tensor.shape
        return len(shape) == 2 and max(shape) >= THIN * min(shape)


def _is_lookup(user: Node, table: Node) -> bool:
    return user.target is _LOOKUP and user.args[0] is table
