"""What codes of a cache stand for, as the text of a kernel: bytes become floating-point numbers in registers.

A conversion instruction runs at a fraction of the rate of an addition, so codes go into the mantissa of a power of two,
which is then subtracted: 128 + c in bfloat16 (c < 128), 1024 + c in float16, 2^23 + c in float32. An 8-bit code is the
sum of two such numbers in bfloat16. An E4M3 code is moved to where the type has its exponent, and multiplied by a power
of two, which serves subnormals too.

On NVIDIA GPUs two instructions of `prmt` make four numbers of 16 bits from four bytes, which Triton would move one by
one. Elsewhere `PTX` is False.
"""

from __future__ import annotations

import torch

from ...compiler.cached import CacheScheme
from .text import Text

_MAGIC = {torch.bfloat16: 0x4300, torch.float16: 0x6400, torch.float32: 0x4B000000}
_BASE = {torch.bfloat16: 128.0, torch.float16: 1024.0, torch.float32: 8388608.0}
_NAMES = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}
# An E4M3 code's exponent and mantissa go this far down from the top byte; what is then missing in the exponent's bias.
_E4M3 = {torch.bfloat16: (4, 2.0**120), torch.float16: (1, 2.0**8), torch.float32: (4, 2.0**120)}


def numbers(text: Text, made: str, loaded: str, plane: int, scheme: CacheScheme, dtype: torch.dtype) -> None:
    """Assigns to `made` the numbers of one plane of the bytes `loaded` (a uint8 tile), without scale and low."""
    if scheme.format == "fp8":
        _either(text, made, loaded, _e4m3(loaded, dtype), _ptx_e4m3(dtype), dtype)
        text.add(f"{made} = {made} * {_E4M3[dtype][1]!r}")
        return
    bits, magic, base = scheme.bits, _MAGIC[dtype], _BASE[dtype]
    centre = 0 if scheme.low else 2 ** (bits - 1)
    if bits == 8 and dtype == torch.bfloat16:  # its mantissa holds 7 bits
        _plane(text, f"{made}_low", loaded, 0, 4, magic, dtype)
        _plane(text, f"{made}_high", loaded, 1, 4, magic + 0x200, dtype)  # 2^11 + 16·c
        text.add(f"{made} = ({made}_low - {base + centre}) + ({made}_high - 2048.0)")
        return
    _plane(text, made, loaded, plane, bits, magic, dtype)
    text.add(f"{made} = {made} - {base + centre}")


def _plane(text: Text, made: str, loaded: str, plane: int, bits: int, magic: int, dtype: torch.dtype) -> None:
    """The codes of one plane in the mantissa of what has the bits `magic`."""
    moved = f"({loaded} >> {bits * plane})" if plane else loaded
    last = plane == 8 // bits - 1
    codes = moved if last else f"({moved} & {2**bits - 1})"
    word = "tl.uint32" if dtype == torch.float32 else "tl.uint16"
    plain = f"({codes}.to({word}) | {magic:#x}).to({_NAMES[dtype]}, bitcast=True)"
    ptx = [f"shr.b32 t, $2, {bits * plane};" if plane else "mov.b32 t, $2;"]
    ptx += [f"and.b32 t, t, {_four(2**bits - 1)};"] if bits < 8 else []
    ptx += [f"prmt.b32 $0, t, {_four(magic >> 8)}, 0x5140;", f"prmt.b32 $1, t, {_four(magic >> 8)}, 0x7362;"]
    _either(text, made, loaded, plain, ptx, dtype)


def _e4m3(loaded: str, dtype: torch.dtype) -> str:
    wide, down = dtype.itemsize * 8, _E4M3[dtype][0]
    word, bits = ("tl.uint32" if wide == 32 else "tl.uint16"), f"{loaded}.to(tl.uint{wide})"
    sign, rest = f"({bits} & 128) << {wide - 8}", f"({bits} & 127) << {wide - 8 - down}"
    return f"(({sign}) | ({rest})).to({word}).to({_NAMES[dtype]}, bitcast=True)"


def _ptx_e4m3(dtype: torch.dtype) -> list[str]:
    lines = []
    for result, bytes_ in (("$0", "0x1404"), ("$1", "0x3424")):  # two bytes to the tops of 16 bits
        lines += [f"prmt.b32 t, $2, 0, {bytes_};", "and.b32 u, t, 0x7f007f00;", f"shr.b32 u, u, {_E4M3[dtype][0]};"]
        lines.append(f"lop3.b32 {result}, t, 0x80008000, u, 0xea;")  # (t & signs) | u
    return lines


def _either(text: Text, made: str, loaded: str, plain: str, ptx: list[str], dtype: torch.dtype) -> None:
    if dtype.itemsize != 2:
        text.add(f"{made} = {plain}")
        return
    with text.block("if PTX:"):
        half = len(ptx) // 2
        text.add(
            f"{made} = tl.inline_asm_elementwise(",
            f'    "{{ .reg .b32 t, u; {" ".join(ptx[:half])} "',
            f'    "{" ".join(ptx[half:])} }}",',
            f'    "=&r,=&r,r", [{loaded}], dtype={_NAMES[dtype]}, is_pure=True, pack=4,',
            ")",
        )
    with text.block("else:"):
        text.add(f"{made} = {plain}")


def _four(byte: int) -> str:
    return f"{byte * 0x01010101:#010x}"
