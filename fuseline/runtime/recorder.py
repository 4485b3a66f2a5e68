"""What records a stretch of GPU work so that it can be launched again as one."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch

from ..compiler.compat import capture_reader, stream_reader


class Recorder(Protocol):
    """Records the work that a function launches, without running it."""

    def busy(self) -> bool:
        """Whether the caller is recording already."""

    def place(self) -> Hashable:
        """What recordings are kept apart for: the stream that work is launched on."""

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that runs `work`'s launches again, and the results that it fills each time."""


class _Pool:
    """Memory for recordings. It ends with its last graph; so an idle one is kept for as long as anyone records."""

    def __init__(self, device: torch.device):
        self.handle = torch.cuda.graph_pool_handle()
        self.keeper = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.keeper, pool=self.handle, capture_error_mode="thread_local"):
            torch.zeros(1, device=device)


class CudaRecorder:
    """CUDA graphs on one device; those of one stream share their memory, since their replays never overlap."""

    _shared: weakref.WeakValueDictionary[Hashable, _Pool] = weakref.WeakValueDictionary()

    def __init__(self, device: torch.device):
        self.device = device
        self._pools: dict[Hashable, _Pool] = {}
        # Both are asked at every call, and no function of ours stands before PyTorch's.
        self.busy: Callable[[], bool] = capture_reader()
        self.place: Callable[[], Hashable] = stream_reader(device)

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with torch.cuda.device(self.device):
            pool = self._pool()
            graph = torch.cuda.CUDAGraph()
            try:
                # Other threads may go on allocating: only what this one does is recorded.
                with torch.cuda.graph(graph, pool=pool.handle, capture_error_mode="thread_local"):
                    results = work()
            except RuntimeError:
                _Pool(self.device)  # a capture that ends well: the random generator still thinks it is in one
                raise
        return graph.replay, results

    def _pool(self) -> _Pool:
        key = (self.device, self.place())
        pool = self._shared.get(key)
        if pool is None:
            pool = self._shared[key] = _Pool(self.device)
        self._pools[key] = pool
        return pool
