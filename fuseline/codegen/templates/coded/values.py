"""Codes → the values of one tile, as kernel text: all of the template that knows number formats.

No code is converted by a conversion instruction, which runs at a fraction of the rate of a logic operation:

integers  the bits of a code or-ed into those of 128 (bfloat16: 0x4300), 1024 (float16: 0x6400) or 2^23 (float32) are
          that number plus the code; one subtraction takes it away with the zero point, exactly (Kim et al., 2022).
          bfloat16 has no room for 8 bits below 128: such a code is the number of its low 7 bits less one of the high
          bit.
floats    a code's exponent and mantissa, moved to where those of the result lie, are its number times a power of two
          that makes up for the biases; subnormal codes become subnormal numbers, so that the factor is exact for them.
int8      for products with 8-bit activations: the code in the upper bits of a byte, its sign bit flipped, is
          (q − 2^(b−1))·2^(8−b); other centres are subtracted.

In 16 bits an instruction works on the two codes of a word's halves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ....compiler.formats.floating import Float
from ....compiler.formats.ternary import Binary, Ternary
from ....compiler.formats.words import COLUMNS
from ...dtypes import triton_type
from ..text import Text
from . import packed
from .weight import Coded

FP8 = torch.float8_e4m3fn
# dtype → (bits of the mantissa, bias of the exponent, the magic number's bits)
MANTISSAS = {torch.bfloat16: (7, 127, 0x4300), torch.float16: (10, 15, 0x6400), torch.float32: (23, 127, 0x4B000000)}


@dataclass(frozen=True)
class Values:
    """Writes tiles of one weight's values in `target`, a floating-point type, int8, or FP8 for e4m3 codes.

    packed: whether kernels have the constant PACKED, for instructions on pairs that no compiler finds (`packed.py`).
    """

    weight: Coded
    target: torch.dtype
    packed: bool = False

    @property
    def factor(self) -> float:
        """What the products have to be multiplied by: int8 values may be larger than the codes' numbers."""
        return 2.0 ** (self.weight.element.bits - 8) if self._in_upper_bits else 1.0

    @property
    def magic(self) -> int | None:
        """The bits that codes are or-ed into; None where there are none."""
        if self.target not in MANTISSAS or isinstance(self.weight.element, Float):
            return None
        bits = MANTISSAS[self.target][2]
        return bits if self._wide else bits * 0x10001

    @property
    def base(self) -> float:
        """What values lie above their codes before anything is subtracted."""
        if self.magic is None:
            return 0.0
        if self.in_two:
            return -128.0
        return {torch.bfloat16: 128.0, torch.float16: 1024.0}.get(self.target, 2.0**23)

    @property
    def centre(self) -> float | None:
        """What a code's number lies below the code, where no zero point says so; None for floats."""
        element = self.weight.element
        if isinstance(element, Float) or self.weight.zero is not None:
            return None
        if isinstance(element, (Ternary, Binary)):
            return 1.0
        return 0.0 if self._in_upper_bits or not self.weight.run else 2.0 ** (element.bits - 1)

    @property
    def _in_upper_bits(self) -> bool:
        element = self.weight.element
        plain = isinstance(element, (Ternary, Binary)) or self.weight.zero is not None
        return self.target == torch.int8 and self.weight.run > 0 and not plain

    @property
    def in_two(self) -> bool:
        """Whether a code is made of two numbers: bfloat16 has no room for 8 bits below 128."""
        integer = not isinstance(self.weight.element, Float)
        return self.target == torch.bfloat16 and integer and self.weight.element.bits == 8 and self.weight.run > 0

    @property
    def zero_added(self) -> int | None:
        """Where codes and zero points meet as bits: 2^b − 1 − zero is added to a code, and this number is 2^b − 1.
        Packed instructions subtract the zero point itself, as the bits of a number.

        A half has room for the sum, which an addition of two codes at once makes; None where it has not, or where the
        pieces of a tile have zero points of their own.
        """
        weight, rooms = self.weight, {torch.bfloat16: 6, torch.float16: 8}
        one = weight.groups == 1 or weight.group % weight.step == 0
        if weight.zero is None or self._wide or not one or weight.element.bits > rooms.get(self.target, 0):
            return None
        return 2**weight.element.bits - 1

    @property
    def pairs(self) -> str | None:
        """Packed instructions for a word whose lowest bits are codes: they leave nothing to subtract from codes of two
        numbers or with zero points. None where they save nothing: codes that lie in several words, floats."""
        if not self.packed or self.magic is None or self._wide:
            return None
        element = self.weight.element
        if isinstance(element, Binary) or self.weight.words is None or len(self.weight.words.parts) > 1:
            return None
        mask = both_halves(2**element.bits - 1)
        if self.in_two:
            return packed.apart(LOW_BITS, HIGH_BIT, self.target)
        if self.zero_added is not None:
            return packed.less(mask, self.magic, self.target)
        return packed.joined(mask, self.magic)

    @property
    def _wide(self) -> bool:
        """Whether values are made as float32: for that type, and for exponents that float16 has not."""
        element = self.weight.element
        beyond = isinstance(element, Float) and element.exponent == 5 and self.weight.run > 0
        return self.target == torch.float32 or (self.target == torch.float16 and beyond)

    def constants(self, never: str) -> list[str]:
        """Lines that define what codes are or-ed into; never: a condition that no compiler knows to be false."""
        lines = [f'{packed.NAME}: tl.constexpr = "{self.pairs}"'] if self.pairs else []
        if self.magic is None or self.in_two:
            return lines
        return [
            *lines,
            f"magic = tl.where({never}, 0, {self.magic:#x})  # kept in a register: masks take the immediates",
        ]

    def subtrahend(self, loaded: str) -> str:
        """What a code lies above the number that it stands for, its base included, from stored zero points; in the
        values' type."""
        if self.target == torch.int8:
            return f"{loaded}.to(tl.int8)"
        if self.zero_added is not None:
            plain = f"({self.zero_added} - {loaded}.to(tl.int32)) * 0x10001 + magic"
            return f"{loaded}.to(tl.int32) * 0x10001 + {self.magic} if PACKED else {plain}" if self.pairs else plain
        return f"({loaded}.to(tl.float32) + {self.base!r}).to({triton_type(self.made_in)})"

    def loads(self, name: str, row: str, turn: str, masks: str) -> list[str]:
        """Lines that load what a turn of the loop reads; row: the addresses of the rows' starts, [BLOCK_N, 1]."""
        words = self.weight.words
        if words is None:
            return [f"codes_{name} = tl.load({row} + k[None, :]{masks})"]
        lines = [f"chunk_{name} = {row} + {turn} * {COLUMNS * words.chunk_words}"]
        for at in range(words.chunk_words // words.run):
            column = f"{at * words.run} + tl.arange(0, {words.run})" if at else f"tl.arange(0, {words.run})"
            lines.append(f"words{at}_{name} = tl.load(chunk_{name} + ({column})[None, :]{masks})")
        return lines

    def write(self, text: Text, name: str, dot: int, scale: str | None, zero: str | None) -> None:
        """Defines w_<name>, [BLOCK_N, step], of the dot-th part of a turn.

        scale: of each piece, [BLOCK_N, pieces] or, where all share it, [BLOCK_N]; multiplied in. zero: the same, as
        the number to subtract, the base included. None: there is none.
        """
        weight, w = self.weight, f"w_{name}"
        pieces = weight.step // weight.piece
        if weight.words is None:
            self._bytes(text, name, w)
        elif self.target in MANTISSAS:
            self._halves(text, name, w, dot)
        else:
            self._small_integers(text, name, w, dot)
        several = pieces > 1 and weight.groups > 1 and weight.group % weight.step != 0
        around = "[:, :, None]" if several else "[:, None]"
        added = self.zero_added if zero else None
        if added is not None:
            zero = None
        subtract = f"{zero}{around}" if zero else repr(self.base + (added or self.centre or 0.0))
        # a one-element float would be a float32 scalar beside int8
        if self.target == torch.int8 and not zero:
            subtract = str(int(self.centre or 0))
        has_centre = added is not None or self.centre is not None
        subtracts = zero is not None or (has_centre and float(subtract) != 0)
        if several and (scale or zero):
            text.add(f"{w} = {w}.reshape(BLOCK_N, {pieces}, {weight.piece})")
        if subtracts:  # packed instructions have done it
            with text.block("if not PACKED:" if self.pairs and added is not None else None):
                text.add(f"{w} = {w} - {subtract}")
        if scale:
            text.add(f"{w} = {self._times(w, f'{scale}{around}')}")
        elif self.made_in != self.target:
            text.add(f"{w} = {self._narrowed(w)}")
        if several and (scale or zero):
            text.add(f"{w} = {w}.reshape(BLOCK_N, {weight.step})")

    @property
    def made_in(self) -> torch.dtype:
        """The type in which values are before the scale."""
        return torch.float32 if self._wide else self.target

    def _times(self, w: str, scale: str) -> str:
        """The scale (float32) multiplied in: in bfloat16 where both are, which rounds once as float32 would."""
        exact = self.weight.scaling != "real" or self.weight.scale.meta["val"].dtype == torch.bfloat16
        if self.made_in == torch.bfloat16 and exact:
            return f"{w} * {scale}.to(tl.bfloat16)"
        return self._narrowed(f"({w}.to(tl.float32) * {scale})")

    def _narrowed(self, w: str) -> str:
        if self.target == torch.float32:
            return w
        if self.target == torch.float16:  # what is not a number stays so
            w = f"tl.where({w} > 65504.0, 65504.0, tl.where({w} < -65504.0, -65504.0, {w}))"
        return f"{w}.to({triton_type(self.target)})"

    def _bytes(self, text: Text, name: str, w: str) -> None:
        """Codes that are multiplied as they are stored."""
        text.add(f"{w} = codes_{name}" + (".to(tl.float8e4nv, bitcast=True)" if self.target == FP8 else ""))

    def _pieces(self, dot: int) -> range:
        count = self.weight.step // self.weight.piece
        return range(dot * count, (dot + 1) * count)

    def _code(self, name: str, piece: int, to: int) -> str:
        """The two codes of a piece in each word, as int32, their bits from bit `to` of each half."""
        assert self.weight.words is not None
        found = []
        for at, bit, width, low in self.weight.words.places(piece):
            word, place = f"words{at}_{name}", to + low
            if bit > place:
                word = f"({word} >> {bit - place})"
            elif bit < place:
                word = f"({word} << {place - bit})"
            found.append(f"({word} & {both_halves((1 << width) - 1 << place)})")
        return found[0] if len(found) == 1 else f"({' | '.join(found)})"

    def _shifted(self, name: str, piece: int) -> str:
        """The word with a piece's codes, which are whole there, from the lowest bit of each half on, and others."""
        assert self.weight.words is not None
        [(at, bit, _, _)] = self.weight.words.places(piece)
        return f"(words{at}_{name} >> {bit})" if bit else f"words{at}_{name}"

    def _halves(self, text: Text, name: str, w: str, dot: int) -> None:
        """Pieces, put side by side, then both halves of each word: codes in the channels' order."""
        element = self.weight.element
        pieces = {f"piece{number}_{name}": piece for number, piece in enumerate(self._pieces(dot))}
        names = list(pieces)
        if self.pairs:
            above = [] if self.zero_added is None else [f"zero_{name}[:, None]"]
            with text.block("if PACKED:"):
                for made, piece in pieces.items():
                    text.add(f"{made} = {packed.applied([self._shifted(name, piece), *above])}")
        with text.block("else:" if self.pairs else None):
            for made, piece in pieces.items():
                text.add(f"{made} = {self._piece(text, made, name, piece)}")
        self._side_by_side(text, w, names)
        if self.in_two:
            self._from_two(text, name, w)
            return
        if self._wide:
            low, high = f"({w} & 65535)", f"(({w} >> 16) & 65535)"
            text.add(f"{w} = tl.join({low}, {high}).reshape(BLOCK_N, {self.weight.step})")
            code = _moved(w, element, 23, 32) if isinstance(element, Float) else f"{w} | magic"
            text.add(f"{w} = ({code}).to(tl.float32, bitcast=True)")
            bias = 127
        else:
            self._split(text, w, name, triton_type(self.target))
            bias = MANTISSAS[self.target][1]
        if isinstance(element, Float) and (unbiased := self._unbiased(bias, element)):
            text.add(f"{w} = {w}{unbiased}")

    def _piece(self, text: Text, piece: str, name: str, number: int) -> str:
        """What a piece is before its halves are numbers; `in_two`, the word whose lowest bits are the codes."""
        element = self.weight.element
        if self.in_two:
            return self._shifted(name, number)
        code = self._code(name, number, 1 if isinstance(element, Binary) else 0)
        if isinstance(element, Float) and not self._wide:
            text.add(f"{piece} = {code}")
            return _moved(piece, element, MANTISSAS[self.target][0], 16)
        if self.zero_added is not None:
            return f"{code} + zero_{name}[:, None]"
        return f"{code} | magic" if self.magic and not self._wide else code

    def _from_two(self, text: Text, name: str, w: str) -> None:
        """Words of codes → their numbers less 128: 128 and the low 7 bits, less 128 or, without the high bit, 256.

        The bits are literals: what is no constant would send values through shared memory on their way to the product.
        """
        if self.pairs:
            with text.block("if PACKED:"):
                self._split(text, w, name, "tl.bfloat16")
        with text.block("else:" if self.pairs else None):
            high, (low_mask, low_bits), (high_mask, high_bits) = f"high_{name}", LOW_BITS, HIGH_BIT
            text.add(f"{high} = ({w} & {high_mask}) ^ {high_bits}", f"{w} = ({w} & {low_mask}) | {low_bits}")
            for x in (w, high):
                self._split(text, x, name, "tl.bfloat16")
            text.add(f"{w} = {w} - {high}")

    def _split(self, text: Text, w: str, name: str, kind: str) -> None:
        """Both halves of int32 words as 16-bit numbers, neighbours."""
        for half, x in (("left", w), ("right", f"({w} >> 16)")):
            text.add(f"{half}_{name} = {x}.to(tl.int16).to({kind}, bitcast=True)")
        text.add(f"{w} = tl.join(left_{name}, right_{name}).reshape(BLOCK_N, {self.weight.step})")

    def _small_integers(self, text: Text, name: str, w: str, dot: int) -> None:
        bits, names = self.weight.element.bits, []
        upper = self._in_upper_bits
        to = 8 - bits if upper else 1 if isinstance(self.weight.element, Binary) else 0
        for number, piece in enumerate(self._pieces(dot)):
            names.append(f"piece{number}_{name}")
            code = self._code(name, piece, to)
            text.add(f"{names[-1]} = {code}{f' ^ {both_halves(128)}' if upper else ''}")
        self._side_by_side(text, w, names)
        halves = f"tl.join({w}.to(tl.int8), ({w} >> 16).to(tl.int8))"
        text.add(f"{w} = {halves}.reshape(BLOCK_N, {self.weight.step})")

    def _side_by_side(self, text: Text, w: str, names: list[str]) -> None:
        """Tiles [BLOCK_N, run], in order → w, [BLOCK_N, len(names)·run]; a level of joins is a bit of their number."""
        levels, count = len(names).bit_length() - 1, len(names)
        for _ in range(levels):
            half = len(names) // 2
            for first, second in zip(names[:half], names[half:], strict=True):
                text.add(f"{first} = tl.join({first}, {second})")
            names = names[:half]
        order = ", ".join(map(str, (0, *range(2, 2 + levels), 1)))
        tail = f".permute({order}).reshape(BLOCK_N, {count * self.weight.run})" if levels else ""
        text.add(f"{w} = {names[0]}{tail}")

    def _unbiased(self, bias: int, element: Float) -> str:
        return f" * {2.0 ** (bias - element.bias)!r}" if bias != element.bias else ""


def _moved(code: str, element: Float, mantissa: int, width: int) -> str:
    """Sign, exponent and mantissa of codes in each `width` bits, moved to their places in a floating-point number."""
    low, sign = 2 ** (element.bits - 1) - 1, 2 ** (element.bits - 1)
    low, sign = (both_halves(low), both_halves(sign)) if width == 16 else (low, sign)
    return f"(({code} & {low}) << {mantissa - element.mantissa}) | (({code} & {sign}) << {width - element.bits})"


def both_halves(bits: int) -> int:
    """The same 16 bits in both halves of an int32."""
    both = bits * 0x10001
    return both - (1 << 32) if both >= 1 << 31 else both


LOW_BITS, HIGH_BIT = ((both_halves(mask), both_halves(bits)) for mask, bits in ((127, 0x4300), (128, 0x4380)))
"""(mask, bits) of an 8-bit code in bfloat16: 128 and the low 7 bits; 128 where the high bit is, else 256 (by xor)."""
