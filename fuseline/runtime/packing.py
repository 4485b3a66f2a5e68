"""Packing: where in one piece of memory each of several buffers lies, given when each is in use.

Largest first, each into the smallest gap that it fits among those it meets in time: "greedy by size" of Pisarchyk and
Lee, Efficient Memory Management for Deep Neural Net Inference (2020), with best fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 256  # bytes; what kernels are specialised for is 16


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `size` bytes that is in use from step `first` to step `last`, both included."""

    size: int
    first: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def pack(buffers: Sequence[Lifetime]) -> tuple[list[int], int]:
    """(the offset of each, bytes in all). Buffers that meet in time do not overlap; offsets are aligned."""
    offsets = [0] * len(buffers)
    placed: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, buffers[i].first)):
        size = aligned(buffers[i].size)
        best, smallest, end = 0, 0, 0
        neighbours = sorted((offsets[j], aligned(buffers[j].size)) for j in placed if buffers[i].meets(buffers[j]))
        for start, length in neighbours:
            gap = start - end
            if gap >= size and (not smallest or gap < smallest):
                best, smallest = end, gap
            end = max(end, start + length)
        offsets[i] = best if smallest else end
        placed.append(i)
    return offsets, max((o + aligned(b.size) for o, b in zip(offsets, buffers, strict=True)), default=0)


def peak(buffers: Sequence[Lifetime]) -> int:
    """The most bytes in use at one step: no packing needs less."""
    steps = {b.first for b in buffers}
    return max((sum(b.size for b in buffers if b.first <= step <= b.last) for step in steps), default=0)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
