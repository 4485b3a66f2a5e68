"""The weight store: values of weight expressions, evaluated once and shared by every graph of a model.

An entry is keyed by identity, data pointer and version of its parameters: one that was replaced, or edited in place,
is noticed. `compiler/binder.py` asks for what a graph needs.
"""

from __future__ import annotations

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
