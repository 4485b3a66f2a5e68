"""The norm before a product: x → h, a program a row, in the type in which products are taken."""

from __future__ import annotations

from ...dtypes import triton_type
from ...kernel_text import call
from ..anchor import Anchor
from ..config import next_power_of_two
from ..norms import normalised, statistics
from ..signature import DECORATOR
from ..text import Text, joined, load

WIDTH = 16384
"""Channels that a program takes at a time: mostly the whole row, which is then read from memory once."""


def width(anchor: Anchor) -> int:
    return min(next_power_of_two(anchor.k), WIDTH)


def norm_kernel(anchor: Anchor, name: str, pointers: list[str]) -> str:
    """The kernel's source; grid: rows. pointers: its arguments, h last."""
    text, step = Text(), width(anchor)
    live = f"k < {anchor.k}" if anchor.k % step else None
    text.add(DECORATOR, *call(f"def {name}(", [*pointers, "M"], "):"))
    with text.indented():
        text.add("row = tl.program_id(0).to(tl.int64)", f"x_row = x_ptr + row * {anchor.k}")
        statistics(text, anchor, tile=False, most=WIDTH)
        with text.block(f"for k0 in range(0, {anchor.k}, {step}):"):
            text.add(f"k = k0 + tl.arange(0, {step})")
            text.add(f"x = {load('x_row + k', (live,))}.to(tl.float32)")
            text.add(f"h = {normalised(anchor, 'x', 'k', live)}")
            text.add(
                f"tl.store({pointers[-1]} + row * {anchor.k} + k, h.to({triton_type(anchor.dtype)}){joined((live,))})"
            )
    return str(text)
