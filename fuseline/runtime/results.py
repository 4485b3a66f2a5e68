"""What a replay hands out: copies of the capture's results, each in memory of its own from PyTorch's allocator.

Handing out the capture's own memory where nobody holds the last result would save the copy, and who holds a storage can
be counted. What cannot be seen is what the allocator knows: a caller who reads a result on another stream calls
`record_stream` and lets go of it, and memory from the allocator then waits for that stream, while the next replay would
write into the capture's own at once. Besides, the captures of a stream share one pool, so that any of them may
overwrite what another handed out. So each result is memory from the allocator, as in a call that was not captured.

`clone` was 29 us of a decode step on an H100's host, though it is 1 us in a loop: a step meets the long way through the
dispatcher with cold caches. `results.cpp` asks the allocator, copies on the stream, and makes the tensor: on CPU,
a third of the time of `clone`, in a loop and with cold caches. It runs where a C++ compiler is found and the results
are plain; `clone` otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..compiler.compat import implementation
from . import native

Copies = Callable[[], Any]


def copier(results: Any, stream: Any) -> Copies:
    """A function that copies these results: a tensor, or a sequence with tensors, which becomes a tuple.

    Args:
        results: what a capture fills at each replay.
        stream: the handle of the stream that it is replayed on, current at each call.
    """
    return in_cpp(results, stream) or in_python(results)


def in_cpp(results: Any, stream: Any) -> Copies | None:
    """`copier` compiled; None where it cannot be, or a result is not as most are."""
    single = isinstance(results, torch.Tensor)
    values: Sequence[Any] = (results,) if single else tuple(results)
    tensors = [(i, x) for i, x in enumerate(values) if isinstance(x, torch.Tensor)]
    if not all(_plain(x) for _, x in tensors) or len({x.device for _, x in tensors}) != 1:
        return None
    made = native.module("results")
    if made is None:
        return None
    entries = [(i, implementation(x)) for i, x in tensors]
    function: Copies | None = made.copier(tuple(values), single, entries, stream, in_python(results))
    return function


def in_python(results: Any) -> Copies:
    """`copier` through PyTorch's operators."""
    if isinstance(results, torch.Tensor):
        return results.clone
    return lambda: tuple([x.clone() if isinstance(x, torch.Tensor) else x for x in results])


def _plain(x: torch.Tensor) -> bool:
    """Whether a copy of its bytes, in order, is a copy of the tensor."""
    return (
        type(x) is torch.Tensor
        and x.layout is torch.strided
        and x.numel() > 0
        and not (x.is_conj() or x.is_neg() or x.is_quantized or x.requires_grad)
        and _is_dense(x)
    )


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements lie one beside another, each once, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True
