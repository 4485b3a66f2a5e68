"""Packed pairs in kernels: two words of 16 bits in an int32, as the tensor cores' operands.

    bit of a half    15   14   13   12   11 … 7          6 … 0
                     S0   S1   M0   M1   exponent − 112  mantissa

A bfloat16 has its exponent in bits 14 … 7, so a word is one almost as it stands: with S1 and M1 masked away, M0 is the
exponent's bit of weight 64, and what slot 0 holds comes out times 2^(64 − 112), what it does not hold times 2^-112, one
2^64th of that. For slot 1, S1 moves up by a bit and M1 weighs 32: times 2^(32 − 112), and one 2^32nd of that. The sums
are float32, whose roundings are 2^-24 of them, so nothing has to be set to zero; powers of two are multiplied back at
the end. That is one instruction for two numbers of slot 0, three for two of slot 1. Experts alone are bfloat16 already.

What a slot does not hold thus weighs 2^-32 of its magnitude at most, instead of nothing. The layout is PuzzleMoE's
(2025, section 3.3), whose kernels rebuild each number with shifts; this way of reading it is ours.
"""

from __future__ import annotations

from ....compiler.formats.pairs import ALONE
from ..coded.values import both_halves
from ..text import Text

SCALES = (2.0**48, 2.0**80)
"""What sums of slot 0 and of slot 1 are multiplied by."""


KEPT = (both_halves(0xAFFF), both_halves(0x1FFF))
SIGN = both_halves(0x8000)


def masks(text: Text, slot: str) -> None:
    """Defines keep, sign and scale for `slot`, a number or a block of them."""
    text.add(
        f"keep = tl.where({slot} == {ALONE}, -1, tl.where({slot} == 1, {KEPT[1]}, {KEPT[0]}))",
        f"sign = tl.where({slot} == 1, {SIGN}, 0)",
        f"scale = tl.where({slot} == {ALONE}, 1.0, tl.where({slot} == 1, {SCALES[1]!r}, {SCALES[0]!r}))",
    )


def numbers(words: str) -> str:
    """Two numbers in each int32, by the masks."""
    return f"({words} & keep) | (({words} << 1) & sign)"


def tile(text: Text, name: str, words: str, columns: str) -> None:
    """Defines <name>, bfloat16 [rows, 2·n], of int32 [rows, n] with two numbers each. columns: "2·n"."""
    text.add(
        f"{name} = {words}",
        f"left_{name} = {name}.to(tl.int16).to(tl.bfloat16, bitcast=True)",
        f"right_{name} = ({name} >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)",
        f"{name} = tl.join(left_{name}, right_{name}).reshape(BLOCK_N, {columns})",
    )


def halves(name: str) -> tuple[str, str]:
    """The two numbers of int32 words as float32: a bfloat16 is the upper half of one."""
    return f"({name} << 16).to(tl.float32, bitcast=True)", f"({name} & -65536).to(tl.float32, bitcast=True)"
