"""Weights at run time: the store that evaluates weight expressions once, and the binder that finds the parameters.

Dynamo guards no parameter's identity and shares one compilation among sibling modules, so a compiled graph never holds
a parameter: at each call the binder reads the tensors that Dynamo really passed and asks the store for what the graph
needs of them. A parameter that was replaced, or edited in place, is noticed by identity, data pointer and version.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .compat import real_tensors, storages
from .errors import UserError
from .expressions import Expression, Memo, Param

State = tuple[int, int]


def state_of(tensor: torch.Tensor) -> State:
    """(version, data pointer): both change when a tensor's contents may have. Inference tensors have no version."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


@dataclass
class Entry:
    states: tuple[State, ...]
    others: tuple[TensorWeakRef, ...]
    value: torch.Tensor


class WeightStore:
    """Values of weight expressions, shared by every graph of a model and dropped with the parameters themselves."""

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()
        self.hits = self.misses = 0

    def get(self, expression: Expression, tensors: Sequence[torch.Tensor], memo: Memo | None = None) -> torch.Tensor:
        """The value of `expression`, whose parameters (in order of first appearance) are `tensors`."""
        if isinstance(expression, Param):
            return tensors[0]
        names = expression.parameters()
        key = expression.rename({name: f"${i}" for i, name in enumerate(names)})
        states = tuple(state_of(t) for t in tensors)
        per_parameter = self._entries.setdefault(tensors[0], {})
        entry = per_parameter.get((key, tuple(id(t) for t in tensors[1:])))
        if entry and entry.states == states and all(r() is t for r, t in zip(entry.others, tensors[1:], strict=True)):
            self.hits += 1
            return entry.value
        self.misses += 1
        by_name = dict(zip(names, tensors, strict=True))
        with real_tensors():
            for name, tensor in by_name.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise UserError(
                        f"weight '{name}' holds NaN or infinite values",
                        [f"shape {tuple(tensor.shape)}, {int((~torch.isfinite(tensor)).sum())} of them"],
                        "check the checkpoint; quantizing or folding such a weight would spread them",
                    )
            value = expression.evaluate(by_name.__getitem__, {} if memo is None else memo).contiguous()
            if set(storages(value)) & set(storages(list(tensors))):
                value = value.clone()  # a view would keep its parameter alive, and its entry with it
        others = tuple(TensorWeakRef(t) for t in tensors[1:])
        per_parameter[(key, tuple(id(t) for t in tensors[1:]))] = Entry(states, others, value)
        return value

    def forget(self, tensors: Sequence[torch.Tensor] | None = None) -> None:
        """Drops what was computed from `tensors` (None: everything), after edits that PyTorch does not version."""
        if tensors is None:
            self._entries = WeakTensorKeyDictionary()
            return
        for tensor in tensors:
            self._entries.pop(tensor, None)

    def bytes(self) -> int:
        """Bytes of all values held."""
        return sum(
            e.value.numel() * e.value.element_size() for values in self._entries.values() for e in values.values()
        )


STORE = WeightStore()
"""The process's store: one for all models, since its entries live and die with the parameters."""

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
