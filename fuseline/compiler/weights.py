"""The weight store: values of weight expressions, evaluated once and shared by every graph of a model.

An entry is keyed by identity, memory and version of its parameters: one that was replaced, moved (`p.data = …`), or
edited in place, is noticed. `compiler/binder.py` asks for what a graph needs.

A parameter may be *dropped*: it stays the same object of its module, with its shape, dtype and device, over one NaN
(`stand_in`). What was derived from it before is then the only copy of its values, and is kept until it dies.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .compat import real_tensors, storages
from .errors import UserError
from .expert_expressions import PairsInWords
from .expressions import Expression, InWords, Memo, Output, Pack, Param, Transpose

State = tuple[int, int]

AT_ONCE = 1 << 22
"""Elements that are looked at together."""


def state_of(tensor: torch.Tensor) -> State:
    """(version, data pointer): both change when a tensor's contents may have. Inference tensors have no version."""
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()


def finite(tensor: torch.Tensor) -> bool:
    """Whether all elements are numbers. Some at a time: the check of a stack of experts would take more than it."""
    flat = tensor.detach().view(-1) if tensor.is_contiguous() else tensor.detach()
    return bool(torch.stack([torch.isfinite(part).all() for part in flat.split(AT_ONCE)]).all())


def memory_of(tensor: torch.Tensor, gone: Callable[[Any], None] | None = None) -> Callable[[], Any]:
    """A weak reference to the memory that a tensor lies in; `gone` is called when nothing lies there any more.

    An address alone does not tell: `p.data = p.data * 2`, twice, may end where it began, and raises no version. While
    the memory lives nothing else can lie there.
    """
    try:
        storage = tensor.untyped_storage() if _storages_last() else None
    except (NotImplementedError, RuntimeError):  # no memory of its own
        storage = None
    return (lambda: True) if storage is None else weakref.ref(storage, gone)


@cache
def _storages_last() -> bool:
    """Whether a storage's Python object lives as long as the storage, as PyTorch has had it since 2.1."""
    with real_tensors():
        tensor = torch.empty(1)
    return weakref.ref(tensor.untyped_storage())() is not None


States = tuple[tuple[int, ...], tuple[int, ...]]
_version, _address = operator.attrgetter("_version"), torch.Tensor.data_ptr


def versions_of(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The versions of many tensors, at the lowest cost: this runs at every call."""
    try:
        return tuple(map(_version, tensors))
    except RuntimeError:  # an inference tensor
        return tuple(state_of(t)[0] for t in tensors)


def states_of(tensors: Sequence[torch.Tensor]) -> States:
    """The states of many tensors: versions, and data pointers."""
    return versions_of(tensors), tuple(map(_address, tensors))


def stand_in(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A tensor of this shape over one element, NaN: what a dropped parameter holds instead of its values.

    Its strides are 0. Reading it gives NaN; writing to it is an error of PyTorch's.
    """
    with real_tensors():
        return torch.full((), float("nan"), dtype=dtype, device=device).expand(tuple(shape))


class Seen:
    """What tensors held at one time: their states, and the memory that they lay in."""

    def __init__(self, tensors: Sequence[torch.Tensor]):
        self.states = tuple(map(state_of, tensors))
        self.memory = tuple(map(memory_of, tensors))

    def still(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these tensors, the same objects, hold what they held."""
        return self.states == tuple(map(state_of, tensors)) and not any(m() is None for m in self.memory)


@dataclass
class Entry:
    seen: Seen
    others: tuple[TensorWeakRef, ...]
    value: torch.Tensor


Held = tuple[Expression, tuple[torch.Tensor, ...], torch.Tensor]
"""An expression over `$0`, `$1`, …, the parameters that these stand for, and the value."""


class WeightStore:
    """Values of weight expressions, shared by every graph of a model and dropped with the parameters themselves."""

    def __init__(self) -> None:
        self._entries: Any = WeakTensorKeyDictionary()
        self._dropped: Any = WeakTensorKeyDictionary()  # parameter → its stand-in
        self.hits = self.misses = 0

    def get(self, expression: Expression, tensors: Sequence[torch.Tensor], memo: Memo | None = None) -> torch.Tensor:
        """The value of `expression`, whose parameters (in order of first appearance) are `tensors`."""
        if isinstance(expression, Param):
            return tensors[0]
        known = self.find(expression, tensors)
        if known is not None:
            self.hits += 1
            return known
        self.misses += 1
        value = self.evaluate(expression, tensors, memo)
        with real_tensors():
            if set(storages(value)) & set(storages(list(tensors))):
                value = value.clone()  # a view would keep its parameter alive, and its entry with it
        self.adopt(expression, tensors, value)
        return value

    def find(self, expression: Expression, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The value of `expression` over these tensors as they are now, where it is held."""
        others = tuple(id(t) for t in tensors[1:])
        entry = self._entries.get(tensors[0], {}).get((_key(expression), others))
        if entry is None or not entry.seen.still(tensors):
            return None
        same = all(r() is t for r, t in zip(entry.others, tensors[1:], strict=True))
        return entry.value if same else None

    def peek(self, expression: Expression, tensors: Sequence[torch.Tensor], memo: Memo | None = None) -> torch.Tensor:
        """As `get`, keeping nothing that is not held already."""
        known = self.find(expression, tensors)
        return self.evaluate(expression, tensors, memo) if known is None else known

    def evaluate(
        self, expression: Expression, tensors: Sequence[torch.Tensor], memo: Memo | None = None
    ) -> torch.Tensor:
        """The value of `expression`, computed and not kept. Over dropped parameters, only from what is held of them.

        Raises:
            UserError: a parameter has NaN or infinite values, or was dropped and this was not derived from it before.
        """
        names = expression.parameters()
        with real_tensors():
            if any(self.dropped(t) for t in tensors):
                return self._from_held(expression, tensors)
            for name, tensor in zip(names, tensors, strict=True):
                if tensor.is_floating_point() and not finite(tensor):
                    raise UserError(
                        f"weight '{name}' holds NaN or infinite values",
                        [f"shape {tuple(tensor.shape)}, {int((~torch.isfinite(tensor)).sum())} of them"],
                        "check the checkpoint; quantizing or folding such a weight would spread them",
                    )
            by_name = dict(zip(names, tensors, strict=True))
            return expression.evaluate(by_name.__getitem__, {} if memo is None else memo).contiguous()

    def adopt(self, expression: Expression, tensors: Sequence[torch.Tensor], value: torch.Tensor) -> None:
        """Takes `value` for that of `expression` over `tensors` as they are now."""
        others = tuple(id(t) for t in tensors[1:])
        entry = Entry(Seen(tensors), tuple(TensorWeakRef(t) for t in tensors[1:]), value)
        self._entries.setdefault(tensors[0], {})[_key(expression), others] = entry

    def drop(self, parameters: Iterable[torch.Tensor]) -> None:
        """Puts stand-ins in the place of the parameters' values; what was derived from those stays valid."""
        dropping = list(parameters)
        derived = self.held(dropping)
        for parameter in dropping:
            self._entries.pop(parameter, None)  # what is stale would be so for ever
            parameter.data = stand_in(parameter.shape, parameter.dtype, parameter.device)
            self._dropped[parameter] = Seen([parameter])
        for expression, tensors, value in derived:
            self.adopt(expression, tensors, value)

    def dropped(self, tensor: torch.Tensor) -> bool:
        """Whether a parameter's values are gone. One that was given new ones since (`p.data = …`) is as any other."""
        seen = self._dropped.get(tensor)
        return seen is not None and seen.still([tensor])

    def held(self, parameters: Sequence[torch.Tensor]) -> list[Held]:
        """What was derived from these parameters, or from these and others, and is up to date."""
        wanted = {id(p) for p in parameters}
        return [h for h in self._all_held() if any(id(t) in wanted for t in h[1])]

    def _all_held(self) -> Iterator[Held]:
        for first, values in self._entries.items():
            for (key, _), entry in values.items():
                tensors = (first, *(r() for r in entry.others))
                if not any(t is None for t in tensors) and entry.seen.still(tensors):
                    yield key, tensors, entry.value

    def _from_held(self, expression: Expression, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Evaluates an expression whose parts were derived before its parameters were dropped."""
        names = expression.parameters()
        name_of = {id(t): n for n, t in zip(names, tensors, strict=True)}
        parts: Memo = {}
        for key, over, value in self.held(tensors):
            if all(id(t) in name_of for t in over):
                part = key.rename({f"${i}": name_of[id(t)] for i, t in enumerate(over)})
                parts[part] = value
                if isinstance(part, InWords | PairsInWords):  # what it was laid out from is not held beside it
                    parts.setdefault(part.codes, part.restored(value))
                elif isinstance(part, Transpose):
                    parts.setdefault(part.x, value.transpose(part.first, part.second))
        by_name = dict(zip(names, tensors, strict=True))

        def read(name: str) -> torch.Tensor:
            if not self.dropped(by_name[name]):
                return by_name[name]
            raise UserError(
                f"the values of weight '{name}' were dropped (keep_originals=False), and this graph needs something "
                "else of it than was derived before",
                [f"needed: {describe(expression)}", f"held: {', '.join(map(describe, parts)) or 'nothing'}"],
                "load the original model again, and run it with this pipeline or with keep_originals=True",
            )

        return expression.evaluate(read, parts).contiguous()

    def forget(self, tensors: Sequence[torch.Tensor] | None = None) -> None:
        """Drops what was computed from `tensors` (None: everything), after edits that PyTorch does not version.

        What was derived from a dropped parameter stays: it is the only copy of its values.
        """
        for tensor in list(self._entries) if tensors is None else tensors:
            if not self.dropped(tensor):
                self._entries.pop(tensor, None)

    def bytes(self) -> int:
        """Bytes of all values held."""
        return sum(
            e.value.numel() * e.value.element_size() for values in self._entries.values() for e in values.values()
        )


def describe(expression: Expression) -> str:
    """An expression in short, `pack(codes(quantize(w, int8:sym)))`."""
    if isinstance(expression, Param):
        return expression.name
    head = expression.name if isinstance(expression, Output) else type(expression).__name__.lower()
    scheme = getattr(expression, "scheme", None) if not isinstance(expression, Pack) else None
    parts = [*map(describe, expression.operands()), *([str(scheme)] if scheme is not None else [])]
    return f"{head}({', '.join(parts)})"


def _key(expression: Expression) -> Expression:
    """The same expression whatever its parameters are called."""
    return expression.rename({name: f"${i}" for i, name in enumerate(expression.parameters())})


STORE = WeightStore()
"""The process's store: one for all models, since its entries live and die with the parameters."""
