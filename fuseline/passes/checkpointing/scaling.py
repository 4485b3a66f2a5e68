"""A step with more blocks than were traced.

More blocks add what one of them keeps to the steps behind the last one's forward, and what its backward leaves to
those of the first one's backward; between these ends memory is linear in the block, and so never the largest.
"""

from __future__ import annotations

import numpy as np

from ...compiler.tape import Execution
from .sections import Sections


def rows_of(sections: Sections, execution: Execution, layers: int | None = None) -> np.ndarray:
    """Counts of the distinct sizes at every step that can be the fullest, distinct ones, with `layers` blocks."""
    tape = sections.tape
    block = next((s for s in sections.sections if s.copies > 1), None)
    if layers is None or block is None:
        return np.unique(np.concatenate((execution.forward.counts, execution.backward.counts)), axis=0)
    more = layers - traced_blocks(sections)
    kept = np.zeros(len(tape.sizes))
    for s in block.values:
        if s in execution.saved:
            kept[tape.storages[s].size] += 1
    first, last = _ends(sections)
    forward = [row for i, row in zip(execution.forward.steps, execution.forward.counts) if i >= last[0]]
    behind, ahead = [], []
    place = {i: p for p, i in enumerate(tape.backward)}
    at = 0
    for i, row in zip(execution.backward.steps, execution.backward.counts):
        at = max(at, place.get(i, at))
        if at < last[1]:
            behind.append(row)
        elif at >= first[1]:
            ahead.append(row)
    full = np.array([*forward, *behind]).reshape(-1, len(tape.sizes)) + more * kept
    empty = np.array(ahead).reshape(-1, len(tape.sizes)) + more * block.grows
    return np.unique(np.concatenate((full, empty)), axis=0)


def _ends(sections: Sections) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where the first block's backward begins, and where the last block's forward begins and its backward ends: for
    each end (a position on the tape, an index among the calls of the backward)."""
    tape = sections.tape
    block = next(s for s in sections.sections if s.copies > 1)
    length, behind = len(block.backward), block.copies - 1 - block.which  # blocks behind the one that stands for all
    begins = block.backward.start + (traced_blocks(sections) - 1 - behind) * length  # the first block's
    last_begin = block.backward.start - behind * length
    calls = {i: k for k, i in enumerate(tape.forward)}
    start = calls[block.forward[0]] + behind * len(block.forward)
    return (0, begins), (tape.forward[start], last_begin + length)


def traced_blocks(sections: Sections) -> int:
    """How many copies of the block the graph holds."""
    return max((len(v) for v in sections.instances.values()), default=1)


def for_layers(sections: Sections, layers: int) -> None:
    """Has the solver decide for more blocks than were traced."""
    for section in sections.sections:
        if section.copies > 1:
            more = layers - section.copies
            section.copies, section.which = section.copies + more, section.which + more
