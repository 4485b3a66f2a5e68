"""Sections of a joint graph: what comes before its repeated blocks, one block for all of them, and what comes after.

A block is found by structure alone: the shortest period of the forward's calls (op, constants, types of the result)
that repeats over the longest stretch, cut where the fewest bytes cross.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from ...compiler.costs import is_attention
from ...compiler.regions import region_of, region_saves
from ...compiler.structure import describe_value
from ...compiler.tape import Tape, execute, peak

CUTS = 6
"""How many places to cut the blocks at are tried."""


@dataclass
class Section:
    """One stretch of the forward and the stretch of the backward that belongs to it.

    copies: how often it stands in the graph; forward: positions of the calls of the copy that stands for all;
    backward: indices into `tape.backward` of that copy; grows: for each distinct size, what one copy's backward leaves
    behind (gradients); values: storages that the copy allocates; imports: storages of earlier sections that it reads,
    each with those that provide it, as named by the sections that own them.
    """

    name: str
    copies: int
    forward: list[int]
    backward: range
    grows: np.ndarray
    which: int = 0
    values: list[int] = field(default_factory=list)
    imports: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass
class Sections:
    """sections: in the forward's order; instances: for each storage that stands for others, all of them, itself too;
    like: for storages of a part of a block, before the first whole one or after the last, what stands for such."""

    tape: Tape
    sections: list[Section]
    instances: dict[int, list[int]]
    stands_for: dict[int, int]
    like: dict[int, int]
    gradients: np.ndarray  # [backward calls, distinct sizes]: what the backward itself allocates

    @property
    def blocks(self) -> int:
        """How many copies the repeated block has; 1 where nothing repeats."""
        return max(s.copies for s in self.sections)

    def spread(self, chosen: Any) -> set[int]:
        """Chosen representatives → all their instances."""
        return {i for s in chosen for i in self.instances.get(s, [s])}


def find_sections(tape: Tape, sizes: np.ndarray) -> Sections:
    """The sections of a tape; one alone where no block repeats three times or more."""
    gradients = gradient_profile(tape)
    cuts = [c for found in _blocks(tape, sizes) if (c := _cut(tape, gradients, *found)) is not None]
    if cuts:
        return min(cuts, key=lambda c: _tightness(c, sizes))
    whole = Section("graph", 1, list(tape.forward), range(len(tape.backward)), np.zeros(len(tape.sizes)))
    whole.values = [s for i in tape.forward for s in tape.allocates[i]]
    return Sections(tape, [whole], {}, {}, {}, gradients)


def _tightness(found: Sections, sizes: np.ndarray) -> float:
    """The peak where only what crosses the cuts and attention's results are kept: less where the cuts are better."""
    tape = found.tape
    crossing = {p for section in found.sections for ps in section.imports.values() for p in ps}
    kept = found.spread(crossing)
    kept |= {s for s, one in enumerate(tape.storages) if is_attention(tape.nodes[one.owner])}
    kept |= {s for s, kind in found.like.items() if kind in crossing}
    return max(peak(execute(tape, kept), sizes))


def gradient_profile(tape: Tape) -> np.ndarray:
    """What the backward's own storages take at each of its calls, as counts of the distinct sizes."""
    place = {i: p for p, i in enumerate(tape.backward)}
    changes = np.zeros((len(tape.backward) + 1, len(tape.sizes)))
    for s, one in enumerate(tape.storages):
        if one.owner in place:
            last = max((place[r] for r in one.reads if r in place), default=place[one.owner])
            if s in tape.gradients:
                last = len(tape.backward) - 1
            changes[place[one.owner], one.size] += 1
            changes[last + 1, one.size] -= 1
    return np.cumsum(changes[:-1], 0)


def _calls(tape: Tape) -> list[int]:
    """The forward but for sizes, which blocks share: they are computed where the first one needs them."""
    return [i for i in tape.forward if not tape.is_size[i]]


def _fingerprints(tape: Tape) -> np.ndarray:
    """A number for each call of the forward: equal where op, constants and types are."""
    numbers: dict[Any, int] = {}
    found = []
    for i in _calls(tape):
        node = tape.nodes[i]
        plain = lambda a: "%" if isinstance(a, Node) else a
        args = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: None)
        region = region_of(node) is not None and (bool(region_saves(node)) + 1)  # the user's wishes are part of a block
        key = (node.target, str(args), describe_value(plain(node.meta.get("val"))), region)
        found.append(numbers.setdefault(key, len(numbers)))
    return np.array(found, dtype=np.int32)


def _blocks(tape: Tape, sizes: np.ndarray) -> list[tuple[int, int, int, range]]:
    """(first call, calls of a block, blocks, all that repeats) as indices into `_calls`, for each place in a
    block where the fewest bytes cross; none where nothing repeats enough."""
    marks = _fingerprints(tape)
    n = len(marks)
    if n < 6:
        return []
    periods = np.arange(2, n // 3 + 1)
    equal = np.array([np.count_nonzero(marks[:-p] == marks[p:]) for p in periods])
    if not len(equal) or equal.max() < n // 3:
        return []
    best = (0, 0, 0)
    for p in periods[equal >= 0.8 * equal.max()]:
        begin, length = _longest_run(marks[:-p] == marks[p:])
        if length + p > best[2] * 1.02 and length >= 2 * p:
            best = (begin, int(p), length + int(p))
    begin, period, covered = best
    if not period:
        return []
    crossing = _crossing(tape, sizes, begin, period, covered)
    least = np.flatnonzero(crossing <= crossing.min())
    ends = [int(c) for c in least if c - 1 not in least or c + 1 not in least]
    found = []
    for cut in ends[:CUTS]:
        copies = (covered - cut) // period
        if copies >= 3:
            found.append((begin + cut, period, copies, range(begin, begin + covered)))
    return found


def _longest_run(mask: np.ndarray) -> tuple[int, int]:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0]))))
    if not len(edges):
        return 0, 0
    starts, ends = edges[::2], edges[1::2]
    at = int(np.argmax(ends - starts))
    return int(starts[at]), int(ends[at] - starts[at])


def _crossing(tape: Tape, sizes: np.ndarray, begin: int, period: int, covered: int) -> np.ndarray:
    """Bytes that cross each cut of one period: read by the forward behind it and allocated within the period before."""
    index = {i: k for k, i in enumerate(_calls(tape))}
    middle = begin + period * max(1, covered // period // 2)
    crossing = np.zeros(period)
    for one in tape.storages:
        at = index.get(one.owner)
        if at is None or not middle - period <= at < middle + period:
            continue
        last = max((index[r] for r in one.reads if r in index), default=at)
        for cut in range(max(at + 1, middle), min(last, middle + period - 1) + 1):
            crossing[cut - middle] += sizes[one.size]
    return crossing


def _cut(tape: Tape, gradients: np.ndarray, start: int, period: int, copies: int, alike: range) -> Sections | None:
    forward, backward = _calls(tape), tape.backward
    block_of: dict[int, int] = {}
    for k in range(copies):
        for i in forward[start + k * period : start + (k + 1) * period]:
            block_of[i] = k
    index = {i: k for k, i in enumerate(forward)}
    home = lambda i: -1 if index[i] < start else block_of.get(i, copies)
    middle = copies // 2
    # where each block's backward begins: the first call that reads what only that block knows
    internal = {
        s for s, one in enumerate(tape.storages)
        if one.owner in block_of and all(home(r) == block_of[one.owner] for r in one.reads if r in index)
    }  # fmt: skip
    begins: dict[int, int] = {}
    for place, i in enumerate(backward):
        for s in tape.reads[i]:
            if s in internal:
                begins.setdefault(block_of[tape.storages[s].owner], place)
    if len(begins) < copies or any(begins[k] >= begins[k - 1] for k in range(1, copies)):
        return None
    length = begins[middle - 1] - begins[middle]
    if any(begins[k - 1] - begins[k] != length for k in range(2, copies - 1)):
        return None
    shift = (gradients[begins[middle - 1]] - gradients[begins[middle]]) if middle else gradients[0] * 0
    nothing = np.zeros(len(tape.sizes))
    ends = min(begins[0] + length, len(backward))
    before = Section("before", 1, forward[:start], range(ends, len(backward)), nothing)
    block = Section("block", copies, forward[start + middle * period : start + (middle + 1) * period],
                    range(begins[middle], begins[middle] + length), shift, middle)  # fmt: skip
    after = Section("after", 1, forward[start + copies * period :], range(begins[copies - 1]), nothing)
    instances: dict[int, list[int]] = {}
    stands_for: dict[int, int] = {}
    for offset in range(period):
        own = tape.allocates[forward[start + middle * period + offset]]
        for which, s in enumerate(own):
            every = [tape.allocates[forward[start + k * period + offset]] for k in range(copies)]
            if any(len(one) != len(own) for one in every):
                return None
            instances[s] = [one[which] for one in every]
            stands_for.update({one[which]: s for one in every})
    like: dict[int, int] = {}
    for at in (*range(alike.start, start), *range(start + copies * period, alike.stop)):
        kind = block.forward[(at - start) % period]
        like.update(zip(tape.allocates[forward[at]], tape.allocates[kind]))
    sections = [before, block, after]
    for section in sections:
        section.values = [s for i in section.forward for s in tape.allocates[i]]
        mine = set(section.values)
        calls = [*section.forward, *(backward[p] for p in section.backward)]
        for i in calls:
            for s in tape.reads[i]:
                owner = tape.storages[s].owner
                if s not in mine and owner in index and s not in section.imports:
                    section.imports[s] = (stands_for.get(s, s),)
    for offset, i in enumerate(block.forward):  # the first block reads from `before` what others read from a neighbour
        for s, other in zip(tape.reads[i], tape.reads[forward[start + offset]]):
            provider = stands_for.get(other, other)
            if s in block.imports and tape.storages[other].owner in index and provider not in block.imports[s]:
                block.imports[s] = (*block.imports[s], provider)
    return Sections(tape, [s for s in sections if s.forward or len(s.backward)], instances, stands_for, like, gradients)
