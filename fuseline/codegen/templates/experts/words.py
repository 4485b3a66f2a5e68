"""Packed pairs in kernels: words of 16 bits that become bfloat16 with a mask.

    bit of a word    15   14   13   12   11 … 7          6 … 0
                     S0   S1   M0   M1   exponent − 112  mantissa

A bfloat16 has its exponent in bits 14 … 7, so a word is one almost as it stands: with S1 and M1 masked away, M0 is the
exponent's bit of weight 64, and what slot 0 holds comes out times 2^(64 − 112), what it does not hold times 2^-112, one
2^64th of that. For slot 1, S1 moves up by a bit and M1 weighs 32: times 2^(32 − 112), and one 2^32nd of that. The sums
are float32, whose roundings are 2^-24 of them, so nothing has to be set to zero; powers of two are multiplied back at
the end. That is one instruction for two numbers of slot 0, three for two of slot 1. Experts alone are bfloat16 already.

What a slot does not hold thus weighs 2^-32 of its magnitude at most, instead of nothing. The layout is PuzzleMoE's
(2025, section 3.3), whose kernels rebuild each number with shifts; this way of reading it is ours.

One token reads words two at a time, as int32, and its masks are values of the kernel (`masks`). Tiles read them as
int16 with masks that are constants (`tile`): only then does Triton bring them from shared memory to where tensor cores
want their operand in one move, swizzled. A mask that is a value costs a second trip through shared memory, and 8 of a
pass's addresses fall on one bank. So a tile has a loop of its own for each slot.
"""

from __future__ import annotations

from ....compiler.formats.pairs import ALONE
from ..coded.values import both_halves
from ..text import Text

SCALES = (2.0**48, 2.0**80, 1.0)
"""What sums of slot 0, of slot 1 and of experts alone are multiplied by."""

MASKS = (0xAFFF, 0x1FFF)
"""What is kept of words as they stand, for slot 0 and for slot 1."""

_SIGN = 0x8000  # of slot 1, when a word has moved up by a bit
_PTX = (
    f"and.b32 $0, $1, {MASKS[0] * 0x10001:#x};",
    "{ .reg .b32 t; shl.b32 t, $1, 1; "
    f"and.b32 t, t, {_SIGN * 0x10001:#x}; and.b32 $0, $1, {MASKS[1] * 0x10001:#x}; or.b32 $0, $0, t; }}",
)


def masks(text: Text, slot: str) -> None:
    """Defines keep, sign and scale for `slot`, a number or a block of them."""
    first, second = (both_halves(mask) for mask in MASKS)
    text.add(
        f"keep = tl.where({slot} == {ALONE}, -1, tl.where({slot} == 1, {second}, {first}))",
        f"sign = tl.where({slot} == 1, {both_halves(_SIGN)}, 0)",
        f"scale = {scale(slot)}",
    )


def scale(slot: str) -> str:
    first, second, alone = SCALES
    return f"tl.where({slot} == {ALONE}, {alone!r}, tl.where({slot} == 1, {second!r}, {first!r}))"


def numbers(words: str) -> str:
    """Two numbers in each int32, by the masks."""
    return f"({words} & keep) | (({words} << 1) & sign)"


def tile(text: Text, made: str, words: str, slot: int) -> None:
    """Defines `made`, bfloat16, of int16 of the same shape. On NVIDIA GPUs (`PTX`) an instruction serves two numbers,
    where Triton would take each for itself."""
    if slot == ALONE:
        text.add(f"{made} = {words}.to(tl.bfloat16, bitcast=True)")
        return
    with text.block("if PTX:"):
        text.add(
            f"{made} = tl.inline_asm_elementwise(",
            f'    "{_PTX[slot]}", "=&r,r", [{words}], dtype=tl.bfloat16, is_pure=True, pack=2',
            ")",
        )
    with text.block("else:"):
        plain = (
            f"{words} & {_signed(MASKS[0])}"
            if slot == 0
            else (f"({words} & {MASKS[1]}) | (({words} << 1) & {_signed(_SIGN)})")
        )
        text.add(f"{made} = ({plain}).to(tl.bfloat16, bitcast=True)")


def _signed(bits: int) -> int:
    """16 bits as an int16."""
    return bits - 0x10000 if bits >= 0x8000 else bits


def halves(name: str) -> tuple[str, str]:
    """The two numbers of int32 words as float32: a bfloat16 is the upper half of one."""
    return f"({name} << 16).to(tl.float32, bitcast=True)", f"({name} & -65536).to(tl.float32, bitcast=True)"
