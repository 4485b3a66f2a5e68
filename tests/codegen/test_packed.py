"""The packed instructions of coded weights, run by hand on all codes and zero points."""

from __future__ import annotations

import re

import pytest
import torch

from fuseline.codegen.templates.coded import packed
from fuseline.codegen.templates.coded.values import MANTISSAS, both_halves

HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
ALL = 0xFFFFFFFF


def run(text: str, *words: int) -> int:
    """$0 of PTX: lop3 by its table, fma on the halves."""
    known = {f"${number}": word & ALL for number, word in enumerate(words, 1)}
    read = lambda operand: known[operand] if operand in known else int(operand, 16)
    for line in re.findall(
        r"(\S+) ([^;{}]+);", text.replace("{ .reg .b32 t, m; ", "").replace("{ .reg .b32 t, u, m; ", "")
    ):
        opcode, (target, *operands) = line[0], [operand.strip() for operand in line[1].split(",")]
        values = [read(operand) for operand in operands]
        if opcode == "mov.b32":
            known[target] = values[0]
        elif opcode == "lop3.b32":
            known[target] = lop3(*values)
        else:
            known[target] = fma(HALVES[opcode.removeprefix("fma.rn.")], *values)
    return known["$0"]


def lop3(a: int, b: int, c: int, table: int) -> int:
    made = 0
    for bit in range(32):
        at = (a >> bit & 1) << 2 | (b >> bit & 1) << 1 | (c >> bit & 1)
        made |= (table >> at & 1) << bit
    return made


def numbers(word: int, kind: torch.dtype) -> list[float]:
    bits = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
    return bits.view(kind).double().tolist()


def fma(kind: torch.dtype, *words: int) -> int:
    a, b, c = (numbers(word, kind) for word in words)
    rounded = torch.tensor([x * y + z for x, y, z in zip(a, b, c)], dtype=torch.float64).to(kind)
    low, high = (int(x) & 0xFFFF for x in rounded.view(torch.int16))
    return high << 16 | low


def word(low: int, high: int, bits: int) -> int:
    """Two codes with other bits around them."""
    return (low | high << 16 | ~both_halves(2**bits - 1)) & ALL


@pytest.mark.parametrize("kind", HALVES.values(), ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_codes_less_zero_points(kind: torch.dtype, bits: int) -> None:
    magic = MANTISSAS[kind][2] * 0x10001
    text = packed.less(both_halves(2**bits - 1), magic, kind)
    for code in range(2**bits):
        for zero in range(2**bits):
            other = 2**bits - 1 - code
            found = numbers(run(text, word(code, other, bits), zero * 0x10001 + magic), kind)
            assert found == [code - zero, other - zero]


@pytest.mark.parametrize("kind", HALVES.values(), ids=str)
def test_codes_above_a_number(kind: torch.dtype) -> None:
    bits, above = (4, 128) if kind == torch.bfloat16 else (8, 1024)
    text = packed.joined(both_halves(2**bits - 1), MANTISSAS[kind][2] * 0x10001)
    for code in range(2**bits):
        assert numbers(run(text, word(code, 1, bits)), kind) == [above + code, above + 1]


def test_eight_bits_are_the_low_seven_less_the_high_one() -> None:
    low, high = ((both_halves(mask), both_halves(bits)) for mask, bits in ((127, 0x4300), (128, 0x4380)))
    text = packed.apart(low, high, torch.bfloat16)
    for code in range(256):
        assert numbers(run(text, word(code, 255 - code, 8)), torch.bfloat16) == [code - 128, 127 - code]
