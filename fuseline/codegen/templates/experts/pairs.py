"""Pairs of experts in few bits (`formats/pair_codes.py`) → the values of one tile, for one expert or for both.

A pair's code is a magnitude and a state of 3 bits: B, A and `both` from the lowest. `both`: A and B are the signs of
the first and of the second expert; else A says which of them has the magnitude, and B its sign. In words of codes
(`formats/words.py`) magnitude and B are the low part, A and `both` the high one, two codes to a register:

    low     B | magnitude            once for both: a number of bfloat16 or float16, halved, times the scale
    high    both | A                 a factor of each expert: sign in bit 15, whether it has the magnitude in bit 14

Bit 14 alone is the number 2 in either type, and no bit is 0, so a factor is ±2 or ±0 as it stands, and one product of
two halves makes the values, exactly. That is some 14 logic operations for the four values of two pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ....compiler.formats.pair_codes import PAIR_CODES
from ...dtypes import triton_type
from ..coded.values import MANTISSAS, Values, both_halves
from ..coded.weight import Coded
from ..text import Text

SIGN, HAS = both_halves(0x8000), both_halves(0x4000)
FIRST, SECOND, BY_SLOT = "first", "second", "slot"
"""Whose values: those of slot 0, of slot 1, or of the kernel's variable `slot`."""


@dataclass(frozen=True)
class CodedPairs(Coded):
    """`Coded` of the rows of all pairs; places: rows and slots, which say where each expert is. Scales lie across in
    each pair, [R, k / group, m]."""

    places: tuple[Node, ...] = ()

    @property
    def bits(self) -> int:
        return sum(PAIR_CODES[self.name].planes)

    @property
    def scaling(self) -> str:
        return "real"

    @property
    def title(self) -> str:
        return f"pairs in {super().title}"


@dataclass(frozen=True)
class PairValues(Values):
    """Writes tiles of the values of pairs. Both formats are exact in bfloat16, so float32 is made of that."""

    @property
    def made_in(self) -> torch.dtype:
        return torch.bfloat16 if self.target == torch.float32 else self.target

    @property
    def magic(self) -> int | None:
        """Of integers' magnitudes."""
        return None if PAIR_CODES[self.weight.name].bits > 3 else MANTISSAS[self.made_in][2] * 0x10001

    def slot(self, text: Text) -> None:
        """Defines what the factors of `slot` are made with."""
        text.add(f"own = tl.where(slot == 1, 0, {SIGN})", f"other = tl.where(slot == 1, 0, {HAS})")

    def write_pairs(self, text: Text, name: str, dot: int, scale: str | None, made: dict[str, str]) -> None:
        """Defines values [BLOCK_N, step] of the dot-th part of a turn; made: whose → the variable. scale: `write`'s."""
        assert self.weight.words is not None
        bits = PAIR_CODES[self.weight.name].bits
        sizes: list[str] = []
        factors: dict[str, list[str]] = {whose: [] for whose in made}
        for number, piece in enumerate(self._pieces(dot)):
            low, high, size = (f"{word}{number}_{name}" for word in ("low", "high", "piece"))
            (at, bit, width, _), (above, place, *_) = self.weight.words.places(piece)
            text.add(
                f"{low} = {_moved(f'words{at}_{name}', bit, 0)} & {both_halves((1 << width) - 1)}",
                f"{high} = {_moved(f'words{above}_{name}', place, 13)} & {both_halves(0x6000)}",
                f"{size} = {self._magnitude(low)}",
            )
            sizes.append(size)
            for whose, names in factors.items():
                names.append(f"{whose}{number}_{name}")
                text.add(f"{names[-1]} = {_factor(whose, f'({low} << {15 - bits})', high)}")
        size = f"size_{name}"
        self._side_by_side(text, size, sizes)
        self._split(text, size, name, triton_type(self.made_in))
        wide = ".to(tl.float32)" if self.target == torch.float32 else ""
        halved = f"{size} * {self._half!r}" + (f" - {self._base / 2!r}" if self.magic else "")
        text.add(f"{size} = ({halved}){wide}" if wide else f"{size} = {halved}")
        if scale is not None:
            self._scaled(text, size, scale)
        for whose, w in made.items():
            self._side_by_side(text, w, factors[whose])
            self._split(text, w, name, triton_type(self.made_in))
            text.add(f"{w} = {size} * {w}{wide}")

    def _magnitude(self, low: str) -> str:
        if self.magic is not None:
            return f"({low} & {both_halves(7)}) | magic"
        return f"({low} & {both_halves(0x7F)}) << {MANTISSAS[self.made_in][0] - 3}"

    @property
    def _half(self) -> float:
        """What makes halves of magnitudes: E4M3 has a bias of 7."""
        return 0.5 if self.magic is not None else 2.0 ** (MANTISSAS[self.made_in][1] - 7 - 1)

    @property
    def _base(self) -> float:
        """The number whose bits are `magic`."""
        return 128.0 if self.made_in == torch.bfloat16 else 1024.0

    def _scaled(self, text: Text, w: str, scale: str) -> None:
        weight = self.weight
        around = "[:, :, None]" if weight.several else "[:, None]"
        if weight.several:
            text.add(f"{w} = {w}.reshape(BLOCK_N, {weight.step // weight.piece}, {weight.piece})")
        times = f"{w} * {scale}{around}" if self.target == torch.float32 else self._times(w, f"{scale}{around}")
        text.add(f"{w} = {times}")
        if weight.several:
            text.add(f"{w} = {w}.reshape(BLOCK_N, {weight.step})")


def _moved(word: str, bit: int, to: int) -> str:
    """Bits that begin at `bit` of each half, beginning at `to`; what lies around them comes along."""
    if bit == to:
        return word
    return f"({word} >> {bit - to})" if bit > to else f"({word} << {to - bit})"


def _factor(whose: str, second_sign: str, high: str) -> str:
    """±2 or ±0; second_sign: B in bit 15; high: `both` in bit 14, A below it."""
    a, both = f"({high} << 2)", f"({high} << 1)"  # both in bit 15
    if whose == SECOND:
        return f"({second_sign} & {SIGN}) | (({high} | ({high} << 1)) & {HAS})"
    own, other = ("own", "other") if whose == BY_SLOT else (str(SIGN), str(HAS))
    chosen = f"({both} & {own})" if whose == BY_SLOT else both
    sign = f"(({a} & {chosen}) | ({second_sign} & ~{chosen}))"
    return f"({sign} & {SIGN}) | (({high} | (({high} << 1) ^ {other})) & {HAS})"
