"""CUDA graphs: a compiled graph that is called again with the same sizes and the same caches is replayed.

What a decode step costs the host is its launches; a captured step is one launch. Weights, and the inputs that the
graph writes to (a KV cache), are read where they lie: their addresses are part of the key, and a call with others is
run plainly and captured in its turn. The remaining inputs, a few tokens and positions, are copied into buffers of the
capture unless they stay where they are, and results are copied out of it, so that what a caller keeps never changes
under him (`results.py` says why nothing less will do).

A key is run plainly the first time, on buffers of its own the second time (so that every kernel is loaded as the
capture needs it), and captured the third.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..compiler.binder import Binder, Bound
from .recorder import Recorder
from .results import Copies, copier
from .watch import Watch, watch

log = logging.getLogger("fuseline")
COPIED = 16 << 20  # bytes of inputs, and of results, beyond which a call is not bound by its launches
CAPTURES = 8  # captures kept for one compiled graph
SEEN = 64  # keys remembered that were met once


@dataclass
class Layout:
    """Where a compiled graph's inputs stand among the caller's flat arguments.

    arguments: of all inputs, in the graph's order; written: of those that the graph writes to; symbolic: whether
    sizes may differ from call to call.
    """

    arguments: Sequence[int]
    written: Sequence[int] = ()
    symbolic: bool = False


@dataclass
class _Capture:
    """A call's addresses and sizes, its buffers, and once it was recorded, how to run it again.

    unchanged: whether the tensors among a call's arguments that are read where they lie, weights and caches, lie there
    still and were not edited; moving: positions of those that are copied into `buffers`, whose `targets` hold each
    element once; copies: of the `results` that a replay fills.
    """

    place: Hashable
    sizes: Hashable
    unchanged: Watch
    moving: list[int]
    bound: weakref.ref[Bound]
    buffers: list[torch.Tensor]
    targets: list[torch.Tensor]
    replay: Callable[[], None] | None = None
    results: Any = ()
    copies: Copies = tuple


@dataclass
class CudaGraphs:
    """The captures of one compiled graph.

    run: the graph: its inputs, then its weights. refusal: why nothing is captured any more, once that is known.
    """

    run: Callable[..., Any]
    layout: Layout
    binder: Binder
    recorder: Recorder
    refusal: str | None = None
    captured: OrderedDict[Hashable, _Capture] = field(default_factory=OrderedDict)
    latest: _Capture | None = None
    seen: OrderedDict[Hashable, Sequence[int]] = field(default_factory=OrderedDict)
    large: OrderedDict[Hashable, None] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        written = set(self.layout.written)
        self._fixed = [*self.layout.written, *sorted({index for _, index in self.binder.plain})]
        self._numbers: list[int] | None = None  # positions of the numbers among the arguments, once they were seen
        self._given = [i for i in self.layout.arguments if i not in written]

    def __call__(self, flat: Sequence[Any]) -> Any:
        if self.refusal is not None or self.recorder.busy():
            return self._plainly(flat)
        capture = self.latest
        if capture is None or not self._fits(capture, flat):
            key = self._key(flat)
            capture = self.latest = self.captured.get(key)
            if capture is None or not self._fits(capture, flat):
                return self._first_calls(flat, key)
        if capture.moving:
            torch._foreach_copy_(capture.targets, [_once(flat[i]) for i in capture.moving])
        if capture.replay is None and not self._record(flat, capture):
            return self._plainly(flat)
        assert capture.replay is not None
        capture.replay()
        return _results(capture)

    def _fits(self, capture: _Capture, flat: Sequence[Any]) -> bool:
        """Whether a call's tensors lie where the capture reads them, with the same sizes and unchanged weights."""
        bound = capture.bound()
        return (
            bound is not None
            and capture.place == self.recorder.place()
            and capture.unchanged(flat)  # type: ignore[arg-type]  # the caller's arguments, a tuple
            and (not self.layout.symbolic or capture.sizes == self._sizes(flat))
            and self.binder.is_current(bound)
        )

    def _plainly(self, flat: Sequence[Any]) -> Any:
        return self.run(*[flat[i] for i in self.layout.arguments], *self.binder(flat))

    def _on_buffers(self, flat: Sequence[Any], capture: _Capture) -> Any:
        buffers = dict(zip(capture.moving, capture.buffers, strict=True))
        return self.run(*[buffers.get(i, flat[i]) for i in self.layout.arguments], *self.binder(flat))

    def _sizes(self, flat: Sequence[Any]) -> Hashable:
        """What tells a call's sizes: Dynamo hands every symbol over as a number; without any, shapes are compared."""
        if not self.layout.symbolic:
            return ()
        if self._numbers is None:
            self._numbers = [i for i, x in enumerate(flat) if isinstance(x, (int, float))]
        if self._numbers:
            return tuple([flat[i] for i in self._numbers])
        inputs = [flat[i] for i in self.layout.arguments]
        return tuple([(x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in inputs])

    def _key(self, flat: Sequence[Any]) -> Hashable:
        return (self.recorder.place(), self._sizes(flat), *[flat[i].data_ptr() for i in self._fixed])

    def _first_calls(self, flat: Sequence[Any], key: Hashable) -> Any:
        """The first call of a key runs plainly; the second on buffers, which the third one records.

        Inputs that lay in the same place twice are taken to stay there, and are read where they lie. Should one move
        after all, the key gets another capture, with buffers for all of them.
        """
        if key in self.large:
            return self._plainly(flat)
        tensors = {i: flat[i] for i in self._given if isinstance(flat[i], torch.Tensor)}
        before, now = self.seen.get(key), [x.data_ptr() for x in tensors.values()]
        moved = self.captured.pop(key, None) is not None
        self.seen[key] = [] if moved else now
        _shorten(self.seen, SEEN)
        if before is None:
            return self._plainly(flat)
        stays = {i for i, a, b in zip(tensors, before, now, strict=False) if a == b and not moved}
        moving = [i for i in tensors if i not in stays]
        if _bytes([tensors[i] for i in moving]) > COPIED:
            self._is_large(key)
            return self._plainly(flat)
        with torch.inference_mode(False), torch.no_grad():
            buffers = [
                torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
                for x in (tensors[i] for i in moving)
            ]
        targets = [*map(_once, buffers)]
        for target, i in zip(targets, moving, strict=True):
            target.copy_(_once(flat[i]))
        bound = self.binder.bound_to(flat)
        still = sorted({*self._fixed, *self.binder.watched, *stays})
        capture = _Capture(
            self.recorder.place(),
            self._sizes(flat),
            watch(flat, still, self.binder.versioned(bound)),
            moving,
            weakref.ref(bound, partial(_forget, weakref.ref(self), key)),
            buffers,
            targets,
        )
        results = self._on_buffers(flat, capture)
        outputs = _tensors([results] if isinstance(results, torch.Tensor) else results)
        read, written = _storages([*buffers, *(flat[i] for i in still)]), _storages(outputs)
        if not set(read).isdisjoint(written):
            self.refusal = "a result shares memory with an input"
        elif len(set(written)) < len(written):
            self.refusal = "two results share memory"
        elif _bytes(outputs) > COPIED:
            self._is_large(key)
        else:
            self.captured[key] = capture
            _shorten(self.captured, CAPTURES)
        return results

    def _is_large(self, key: Hashable) -> None:
        self.large[key] = None
        _shorten(self.large, SEEN)

    def _record(self, flat: Sequence[Any], capture: _Capture) -> bool:
        try:
            capture.replay, capture.results = self.recorder.record(lambda: self._on_buffers(flat, capture))
        except RuntimeError as error:  # an operation that CUDA cannot capture: from now on every call runs plainly
            self.refusal = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.captured.clear()
            self.latest = None
            log.warning("a graph cannot be captured and is launched kernel by kernel: %s", self.refusal)
            return False
        capture.copies = copier(capture.results, capture.place)
        return True


def _results(capture: _Capture) -> Any:
    """Apart for those who look at what a replay costs."""
    return capture.copies()


def _forget(graphs: weakref.ref[CudaGraphs], key: Hashable, _: Any) -> None:
    """The weights of a capture were replaced, or died with their model."""
    alive = graphs()
    if alive is not None:
        alive.captured.pop(key, None)
        alive.latest = None


def _once(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the repetitions of an expanded dimension, which cannot be written to."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _tensors(values: Sequence[Any]) -> list[torch.Tensor]:
    return [x for x in values if isinstance(x, torch.Tensor)]


def _storages(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [x.untyped_storage().data_ptr() for x in tensors if x.numel()]


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _shorten(entries: OrderedDict[Hashable, Any], length: int) -> None:
    while len(entries) > length:
        entries.popitem(last=False)
