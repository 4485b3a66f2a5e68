"""The binder: finds a compiled graph's weights for the parameters of one call.

Dynamo guards no parameter's identity and shares one compilation among sibling modules, so a compiled graph never holds
a parameter: at each call the binder reads the tensors that Dynamo really passed and asks the store for what the graph
needs of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from .compat import real_tensors
from .expressions import Expression, Memo, Param
from .weights import STORE, States, WeightStore, memory_of, states_of

_epoch = 0


def refresh() -> None:
    """Makes every binder look again, after edits that raise no version (`.data.copy_()`)."""
    global _epoch
    _epoch += 1


def _no_parameter(name: str) -> torch.Tensor:
    raise KeyError(name)


@dataclass(eq=False)
class Bound:
    """The derived weights of one set of parameters, and the state that the parameters were in."""

    key: tuple[int, ...]  # the parameters' identities
    sources: list[Callable[[], Any]]  # weak references to the parameters, and to the memory that they lay in
    states: States
    values: list[torch.Tensor]
    epoch: int
    dropped: bool = False  # the parameters hold no values that could be edited


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
        self._watched = _getter(self.watched)
        self.bound: dict[tuple[int, ...], Bound] = {}

    def __call__(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """The weights, in order, for these flat arguments."""
        weights: list[Any] = [None] * self.count
        for position, index in self.plain:
            weights[position] = arguments[index]
        for position, constant in self.constants.items():
            weights[position] = constant
        for (position, _, _), value in zip(self.derived, self.bound_to(arguments).values, strict=True):
            weights[position] = value
        return weights

    def bound_to(self, arguments: Sequence[Any]) -> Bound:
        """The derived weights for these flat arguments: the same object as long as no parameter was changed."""
        if not self.derived:
            return _NOTHING
        watched = self._watched(arguments)
        # Identities are enough: an entry goes when one of its parameters dies, before the identity can be used again.
        key = tuple(map(id, watched))
        bound = self.bound.get(key)
        if bound is not None and bound.epoch == _epoch and bound.states == states_of(watched):
            return bound
        values = self._evaluate(arguments)
        while len(self.bound) >= self.LIMIT:
            self.bound.pop(next(iter(self.bound)))
        me = weakref.ref(self)

        def drop(_: Any) -> None:  # a parameter died or moved: nothing may be given these values again
            binder = me()
            if binder is not None:
                binder.bound.pop(key, None)

        sources: list[Callable[[], Any]] = [weakref.ref(t, drop) for t in watched]
        sources += [memory_of(t, drop) for t in watched]
        dropped = all(map(self.store.dropped, watched))
        self.bound[key] = bound = Bound(key, sources, states_of(watched), values, _epoch, dropped)
        return bound

    def versioned(self, bound: Bound) -> list[int]:
        """Positions of the parameters that could be edited in place. `bound`, while it is alive and `is_current`, is
        right for all arguments whose `watched` lie where they did, and whose versions at these positions are the same:
        its parameters are alive, so that another tensor at the address of one shares its memory."""
        return [] if bound.dropped else self.watched

    def is_current(self, bound: Bound) -> bool:
        """Whether nothing asked for another look since."""
        return bound is _NOTHING or bound.epoch == _epoch

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


_NOTHING = Bound((), [], ((), ()), [], 0)


def _getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """The elements at `positions`, as fast as Python can."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda values: tuple(values[i] for i in positions)
