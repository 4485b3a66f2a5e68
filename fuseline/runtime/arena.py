"""Arenas: memory that the calls of generated modules use again and again for what nothing keeps.

A module's `Plan` lays its values out for each set of sizes, once, and hands the same tensors out at every call with
these sizes. They lie in one piece of memory a thread and stream, which all modules share: calls of one thread on one
stream run one after another, and so do their kernels. Another thread, or stream, has a piece of its own. While a CUDA
graph is recorded the values are allocated anew, from the graph's own pool, for the graph to keep. What is large is
allocated at each call as ever: such a call is not bound by the host, and an arena would hold the memory in between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..compiler.compat import current_stream
from .packing import Lifetime, pack

LIMIT = 64 << 20  # bytes of an arena
SETS = 64  # of sizes, remembered a thread
Description = tuple[tuple[int, ...], tuple[int, ...] | None, torch.dtype, int, int]
Values = Sequence[torch.Tensor | None]

_local = threading.local()


class Plan:
    """The values of a module that lie in an arena.

    sizes: from the sizes that differ from call to call to each value's shape, strides (None: contiguous), dtype, and
    the numbers of the steps that write it and that use it last.
    """

    def __init__(self, sizes: Callable[..., Sequence[Description]]):
        self.sizes = sizes
        self._local = threading.local()

    def __call__(self, like: torch.Tensor, *sizes: int) -> Values:
        """The values for a call with these sizes on the current stream of `like`'s device; None for one that the
        region has to allocate."""
        device, stream = like.device, 0
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return self._laid_out(sizes, device, None)[0]
            stream = current_stream(device)
        try:
            known = self._local.known
            arena, values = known[device, stream, sizes]
            if arena is _arenas().get((device, stream)):
                return values
        except (AttributeError, KeyError):
            known = self._local.__dict__.setdefault("known", {})
        if len(known) >= SETS:
            known.clear()
        values, arena = self._laid_out(sizes, device, (device, stream))
        known[device, stream, sizes] = (arena, values)
        return values

    def layout(self, *sizes: int) -> tuple[list[Lifetime], list[int], int]:
        """The values' lifetimes and offsets for these sizes, and the bytes of them all."""
        lifetimes = [Lifetime(_bytes(*d[:3]), *d[3:]) for d in self.sizes(*sizes)]
        return lifetimes, *pack(lifetimes)

    def _laid_out(
        self, sizes: tuple[int, ...], device: torch.device, place: tuple[torch.device, int] | None
    ) -> tuple[Values, torch.Tensor | None]:
        described = self.sizes(*sizes)
        _, offsets, total = self.layout(*sizes)
        if total > LIMIT:
            return (None,) * len(described), _arenas().get(place) if place is not None else None
        with torch.inference_mode(False), torch.no_grad():
            if place is None:
                arena = torch.empty(total, dtype=torch.uint8, device=device)
            else:
                arena = _arena(place, total)
            return tuple(_view(arena, o, *d[:3]) for o, d in zip(offsets, described, strict=True)), arena


def _arenas() -> dict[tuple[torch.device, int], torch.Tensor]:
    try:
        return _local.arenas  # type: ignore[no-any-return]
    except AttributeError:
        _local.arenas = {}
        return _local.arenas  # type: ignore[no-any-return]


def _arena(place: tuple[torch.device, int], size: int) -> torch.Tensor:
    """This thread's memory at a place, of at least `size` bytes. A larger one takes the place of a smaller one, whose
    tensors are not handed out again."""
    arenas = _arenas()
    found = arenas.get(place)
    if found is None or found.numel() < size:
        found = arenas[place] = torch.empty(size, dtype=torch.uint8, device=place[0])
    return found


def _view(
    arena: torch.Tensor, offset: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype
) -> torch.Tensor:
    piece = arena[offset : offset + _bytes(shape, strides, dtype)].view(dtype)
    return piece.view(shape) if strides is None else piece.as_strided(shape, strides)


def _bytes(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: torch.dtype) -> int:
    if 0 in shape:
        return 0
    if strides is None:
        return torch.Size(shape).numel() * dtype.itemsize
    return (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) * dtype.itemsize


def held(device: torch.device | None = None) -> dict[Any, int]:
    """Bytes of this thread's arenas by (device, stream)."""
    return {place: x.numel() for place, x in _arenas().items() if device is None or place[0] == device}
