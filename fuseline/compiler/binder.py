"""The binder: finds a compiled graph's weights for the parameters of one call.

Dynamo guards no parameter's identity and shares one compilation among sibling modules, so a compiled graph never holds
a parameter: at each call the binder reads the tensors that Dynamo really passed and asks the store for what the graph
needs of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .compat import real_tensors
from .expressions import Expression, Memo, Param
from .weights import STORE, State, WeightStore, state_of

_epoch = 0


def refresh() -> None:
    """Makes every binder look again, after edits that raise no version (`.data.copy_()`)."""
    global _epoch
    _epoch += 1


def _no_parameter(name: str) -> torch.Tensor:
    raise KeyError(name)


@dataclass
class _Bound:
    sources: list[weakref.ref[torch.Tensor]]
    states: list[State]
    values: list[torch.Tensor]
    epoch: int


class Binder:
    """Values of a graph's weights for the tensors of one call.

    Args:
        expressions: one for each trailing input of the lifted graph.
        sources: the parameter's name → where it stands in the caller's flat arguments.
    """

    LIMIT = 256  # sets of parameters remembered: sibling modules that share one compilation

    def __init__(self, expressions: Sequence[Expression], sources: dict[str, int], store: WeightStore = STORE):
        self.store = store
        self.plain: list[tuple[int, int]] = []  # (position among the weights, position in the arguments)
        self.derived: list[tuple[int, Expression, list[int]]] = []
        self.constants: dict[int, torch.Tensor] = {}
        for position, expression in enumerate(expressions):
            if not expression.parameters():
                with real_tensors():
                    self.constants[position] = expression.evaluate(_no_parameter)
            elif isinstance(expression, Param):
                self.plain.append((position, sources[expression.name]))
            else:
                self.derived.append((position, expression, [sources[n] for n in expression.parameters()]))
        self.count = len(expressions)
        self.watched = sorted({i for _, _, indices in self.derived for i in indices})
        self.bound: dict[tuple[int, ...], _Bound] = {}

    def __call__(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """The weights, in order, for these flat arguments."""
        weights: list[Any] = [None] * self.count
        for position, index in self.plain:
            weights[position] = arguments[index]
        for position, constant in self.constants.items():
            weights[position] = constant
        if self.derived:
            for (position, _, _), value in zip(self.derived, self._derived_values(arguments), strict=True):
                weights[position] = value
        return weights

    def _derived_values(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        watched = [arguments[i] for i in self.watched]
        key = tuple(map(id, watched))
        bound = self.bound.get(key)
        if (
            bound is not None
            and bound.epoch == _epoch
            and all(ref() is t for ref, t in zip(bound.sources, watched, strict=True))
            and all(state == state_of(t) for state, t in zip(bound.states, watched, strict=True))
        ):
            return bound.values
        values = self._evaluate(arguments)
        while len(self.bound) >= self.LIMIT:
            self.bound.pop(next(iter(self.bound)))
        me = weakref.ref(self)

        def drop(_: Any) -> None:  # a parameter died or was replaced: nothing will ask for these values again
            binder = me()
            if binder is not None:
                binder.bound.pop(key, None)

        sources = [weakref.ref(t, drop) for t in watched]
        self.bound[key] = _Bound(sources, [state_of(t) for t in watched], values, _epoch)
        return values

    def _evaluate(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        values: list[torch.Tensor] = []
        memo: Memo = {}
        previous: tuple[str, ...] = ()
        for _, expression, indices in self.derived:
            names = expression.parameters()
            if names != previous:  # what two expressions share (a quantization) is kept only between neighbours
                memo, previous = {}, names
            values.append(self.store.get(expression, [arguments[i] for i in indices], memo))
        return values
