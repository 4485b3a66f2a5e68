"""Two experts' matrices in one matrix of 16-bit words, and back.

A word holds one magnitude, and for each of the two experts of a pair a sign and whether it has that magnitude or zero:

    bit     15   14   13   12   11 … 7          6 … 0
            S0   S1   M0   M1   exponent − 112  mantissa        of bfloat16

    value of slot p:   0 where M_p is 0, else (−1)^S_p · 2^(exponent − 127) · (1 + mantissa / 128)

Bfloat16 numbers from 2^-15 up to, and without, 2^17 have exponents 112 … 143 and are stored as they are. Below 2^-15 a
magnitude becomes 2^-15 or zero, whichever is nearer, the middle 2^-16 going to 2^-15: the error is 2^-16 at most. A
zero has mask 0 and sign 0; a magnitude that no slot has is stored as exponent and mantissa 0, so the zero of both
experts is word 0. Numbers from 2^17 up, infinities and NaN are refused: no trained weight is as large.

Rows of words that hold one expert alone have *slot 2*: the word is that expert's bfloat16 number, bit by bit. So the
experts that a merge leaves alone lie in one tensor with the pairs, and unchanged.

Source: PuzzleMoE (2025), section 3.3, where zeros become 2^-15 with the clamped numbers.
"""

from __future__ import annotations

import torch

from ..errors import UserError

LOW = 112
"""The exponent that 0 stands for."""

ALONE = 2
"""The slot of an expert that shares its words with none."""

LEAST, TOP = 2.0**-15, 2.0**17


def in_window(magnitude: torch.Tensor) -> torch.Tensor:
    """Magnitudes bfloat16 [...] as words have them: those below 2^-15 are 2^-15 or 0, whichever is nearer.

    Raises:
        UserError: one is 2^17 or more, or no finite number.
    """
    if type(magnitude) is torch.Tensor and bool((~(magnitude < TOP)).any()):
        worst = magnitude[~(magnitude < TOP)].flatten()[0]
        raise UserError(
            f"a weight of magnitude {float(worst):g} fits no packed pair: they hold magnitudes below {TOP:g}",
            remedy="merge with pack=none, or leave out the layer with skip",
        )
    near = torch.where(magnitude >= LEAST / 2, LEAST, 0.0).to(magnitude.dtype)
    return torch.where(magnitude < LEAST, near, magnitude)


def pack_pair(magnitude: torch.Tensor, masks: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Words int16 [...].

    Args:
        magnitude: bfloat16 [...], not negative; by `in_window` if it is not in it.
        masks, signs: bool [2, ...], for each slot whether it has the magnitude, and whether it is negative.
    """
    magnitude = in_window(magnitude)
    masks = masks & (magnitude > 0)
    signs = signs & masks
    magnitude = torch.where(masks.any(0), magnitude, 0)
    bits = magnitude.view(torch.int16).to(torch.int32) - (LOW << 7)
    bits = torch.where(masks.any(0), bits, 0)
    for place, flag in ((15, signs[0]), (14, signs[1]), (13, masks[0]), (12, masks[1])):
        bits = bits | flag.to(torch.int32) << place
    return _words(bits)


def unpack_slot(words: torch.Tensor, slot: int) -> torch.Tensor:
    """The matrix of one slot, 0 or 1 of a pair, or 2 of one alone: bfloat16, of the words' shape."""
    return words.view(torch.bfloat16) if slot == ALONE else _of_pair(words, slot).view(torch.bfloat16)


def unpack_experts(words: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """All experts' matrices, bfloat16 [E, m, n], from words [R, m, n]; rows, slots: int32 [E]. Nothing waits."""
    own, slot = words[rows], slots.to(torch.int32)[:, None, None]
    return torch.where(slot == ALONE, own, _of_pair(own, slot)).view(torch.bfloat16)


def _of_pair(words: torch.Tensor, slot: int | torch.Tensor) -> torch.Tensor:
    """The bits int16 of the numbers that slot 0 or 1 of a pair has."""
    bits = words.to(torch.int32)
    sign, mask = (bits >> (15 - slot)) & 1, (bits >> (13 - slot)) & 1
    return _words(torch.where(mask == 1, (sign << 15) | ((bits & 0x0FFF) + (LOW << 7)), 0))


def _words(bits: torch.Tensor) -> torch.Tensor:
    """int32 numbers of 16 bits as int16."""
    return torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16)
