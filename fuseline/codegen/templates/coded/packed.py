"""Codes → numbers two at a time by instructions of PTX, which no compiler finds.

    lop3    a mask and an or at once. A compiler makes two instructions of it: both operands are constants, and an
            instruction holds one
    fma     minus one times what lies above the numbers, added: Triton would take the halves of a word apart for it

They make the same numbers as the text that other GPUs and the interpreter run (the constant PACKED).
"""

from __future__ import annotations

import torch

_KIND = {torch.bfloat16: ("bf16x2", 0xBF80BF80), torch.float16: ("f16x2", 0xBC00BC00)}  # −1 in both halves
_AND_OR, _AND_XOR = "0xEA", "0x6A"
NAME = "pairs"
"""The instructions' name in a kernel."""


def joined(mask: int, bits: int) -> str:
    """(word & mask) | bits."""
    return f"lop3.b32 $0, $1, {_hex(mask)}, {_hex(bits)}, {_AND_OR};"


def less(mask: int, bits: int, kind: torch.dtype) -> str:
    """The halves of (word & mask) | bits, as numbers of that type, less those of a second word."""
    name, minus = _KIND[kind]
    first = f"lop3.b32 t, $1, {_hex(mask)}, {_hex(bits)}, {_AND_OR};"
    return f"{{ .reg .b32 t, m; {first} mov.b32 m, {_hex(minus)}; fma.rn.{name} $0, $2, m, t; }}"


def apart(low: tuple[int, int], high: tuple[int, int], kind: torch.dtype) -> str:
    """The halves of (word & mask) | bits less those of (word & mask) ^ bits, of `low` and `high`: (mask, bits) each."""
    name, minus = _KIND[kind]
    first = f"lop3.b32 t, $1, {_hex(low[0])}, {_hex(low[1])}, {_AND_OR};"
    second = f"lop3.b32 u, $1, {_hex(high[0])}, {_hex(high[1])}, {_AND_XOR};"
    return f"{{ .reg .b32 t, u, m; {first} {second} mov.b32 m, {_hex(minus)}; fma.rn.{name} $0, u, m, t; }}"


def applied(words: list[str]) -> str:
    """What the instructions make of those int32 words, as kernel text."""
    constraints = ",".join(["=r", *("r" for _ in words)])
    return f'tl.inline_asm_elementwise({NAME}, "{constraints}", [{", ".join(words)}], tl.int32, True, 1)'


def _hex(bits: int) -> str:
    return f"{bits & 0xFFFFFFFF:#x}"
