"""Sorting tokens by expert, on the device: `route_body`, one launch without a wait for the host.

    order  [S]          the S = T·K choices of an expert (number t·K + k), those of a group together, each group in the
                        tokens' order: no group is padded
    tiles  [1 + n, 4]   row 0: how many tiles there are; then of each tile its group, its first and last + 1 place in
                        `order`, and the slot in which the group's words hold it

A group is an expert, or with packed pairs a row of words (`dual`: both its experts) or one of a row's experts. Groups
are cut into tiles of block_m places, so that a program that knows its tile has one matrix to read. Each program of the
launch counts all choices (they are few: T·K numbers from cache), and writes the places and tiles of its own group.

Sizes depend on T, K and E alone, so a CUDA graph that was captured with one routing serves any other. Source: X-MoE
(Yuan et al., 2025) for buffers without padding; the table of tiles is that of vLLM's `moe_align_block_size`.
"""

from __future__ import annotations

from ....compiler.formats.pairs import ALONE
from ..config import next_power_of_two
from ..text import Text
from .read import Experts

SCALARS = ("S", "block_m")
CONSTANTS = ("BLOCK", "KEYS")


def groups(experts: Experts, dual: bool) -> int:
    """Groups that tokens are sorted into."""
    return experts.keys if dual or not experts.pairs else 2 * experts.keys


def bins(experts: Experts, dual: bool) -> int:
    """The power of two that holds all groups, and one more for what is none."""
    return next_power_of_two(groups(experts, dual) + 1)


def route_body(experts: Experts, dual: bool) -> str:
    """The body of the kernel; grid: groups. dual: both experts of a pair are one group."""
    text, count = Text(), groups(experts, dual)
    with text.indented():
        text.add(
            "group = tl.program_id(0)",
            "bins = tl.arange(0, KEYS)",
            "counts = tl.zeros((KEYS,), tl.int32)",
        )
        with text.block("for first in range(0, S, BLOCK):"):
            _groups(text, experts, dual, count)
            text.add("counts += tl.histogram(groups, KEYS)")
        text.add(
            "tiles = (counts + (block_m - 1)) // block_m",
            "own = tl.sum(tl.where(bins == group, counts, 0), 0)",
            "own_tiles = tl.sum(tl.where(bins == group, tiles, 0), 0)",
            "place = tl.sum(tl.where(bins < group, counts, 0), 0)",
            "tile = tl.sum(tl.where(bins < group, tiles, 0), 0)",
        )
        with text.block(f"if group == {count - 1}:"):
            text.add("tl.store(tiles_ptr, tile + own_tiles)")
        with text.block("if own > 0:"):
            text.add("end = place + own", "at = place", *(["slot = 0"] if experts.pairs else []))
            with text.block("for first in range(0, S, BLOCK):"):
                _groups(text, experts, dual, count)
                text.add("mine = groups == group", "rank = tl.cumsum(mine.to(tl.int32), 0) - 1")
                entry = "choice * 2 + (slots == 1).to(tl.int32)" if dual and experts.pairs else "choice"
                text.add(f"tl.store(order_ptr + at + rank, {entry}, mask=mine)", "at += tl.sum(mine.to(tl.int32), 0)")
                if experts.pairs:
                    text.add("slot = tl.maximum(slot, tl.max(tl.where(mine, slots, 0), 0))")
            with text.block("for t0 in range(0, own_tiles, 32):"):
                text.add(
                    "t = t0 + tl.arange(0, 32)",
                    "row = tiles_ptr + (tile + t + 1) * 4",
                    "begin = place + t * block_m",
                    "there = t < own_tiles",
                    "tl.store(row, group + t * 0, mask=there)",
                    "tl.store(row + 1, begin, mask=there)",
                    "tl.store(row + 2, tl.minimum(begin + block_m, end), mask=there)",
                )
                if experts.pairs:
                    text.add("tl.store(row + 3, slot + t * 0, mask=there)")
    return str(text)


def _groups(text: Text, experts: Experts, dual: bool, count: int) -> None:
    """Defines choice and groups, [BLOCK], and with pairs slots; what is no choice is in the group after all others."""
    text.add(
        "choice = first + tl.arange(0, BLOCK)",
        "expert = tl.load(indices_ptr + choice, mask=choice < S, other=-1).to(tl.int32)",
        f"known = (expert >= 0) & (expert < {experts.experts})",
    )
    if not experts.pairs:
        text.add(f"groups = tl.where(known, expert, {count})")
        return
    text.add(
        "groups = tl.load(rows_ptr + expert, mask=known, other=0).to(tl.int32)",
        f"slots = tl.load(slots_ptr + expert, mask=known, other={ALONE}).to(tl.int32)",
    )
    key = "groups" if dual else "groups * 2 + (slots == 1).to(tl.int32)"
    text.add(f"groups = tl.where(known, {key}, {count})")
