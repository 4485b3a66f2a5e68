"""The text of the kernel that adds keys or values to a cache of codes, and codes the blocks that they complete.

    program (sequence and head, i): the i-th block that becomes complete, if there is one; the i-th BLOCK of new rows
                                    that the ring keeps

A block is one tile: its rows come from the ring or from the new ones. With a mean over heads, a program takes all heads
of a sequence one after another. With more than one new token, rows of the ring are overwritten that a block still
needs: two launches then, first CODE, then KEEP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...compiler.cached import E4M3_TOP, CacheScheme
from ..kernel_text import call
from .text import Text, load

CONSTANTS = ("CODE", "KEEP")
ROUND = 12582912.0  # 1.5·2^23: what is added to it is rounded to an integer, half to even


@dataclass(frozen=True)
class Write:
    """What the kernel is specialised for. recent: rows of the ring; stored: dtype of scales, and of x."""

    head: int
    scheme: CacheScheme
    mean: bool
    block: int
    recent: int
    values: bool
    stored: torch.dtype

    def refuse(self) -> str | None:
        """Tiles have powers of two as their sides."""
        group = self.scheme.tokens(self.block) if self.scheme.by_channel else self.scheme.channels(self.head)
        for n, what in ((self.head, "channels"), (group, "members of a group")):
            if n & (n - 1):
                return f"{n} {what}, no power of two"
        return None

    @property
    def tensors(self) -> list[str]:
        low, mean = ["low"] if self.scheme.low else [], ["mean"] if self.mean else []
        return ["codes", "scale", *low, *mean, "recent", "x", "length"]

    @property
    def parameters(self) -> list[str]:
        return [*(f"{t}_ptr" for t in self.tensors), *(f"x_s{i}" for i in range(4)), "heads", "S", "blocks"]

    @property
    def warps(self) -> int:
        return 8 if self.block * self.head >= 8192 else 4


def write_kernel(name: str, write: Write) -> tuple[str, list[str]]:
    """The source and its parameters. Grid: (batch times heads, or batch alone where there is a mean; blocks of x)."""
    text, block, ring = Text(), write.block, write.recent
    parameters = [*write.parameters, *CONSTANTS]
    text.add(
        "@triton.jit",
        *call(f"def {name}(", [*write.parameters, *(f"{c}: tl.constexpr" for c in CONSTANTS)], "):"),
    )
    with text.indented():
        text.add(
            "pid = tl.program_id(0).to(tl.int64)",
            "i = tl.program_id(1)",
            f"T = blocks * {block}",
            "length = tl.load(length_ptr).to(tl.int32)",
            f"r = tl.arange(0, {block})",
            f"d = tl.arange(0, {write.head})",
        )
        one = _head(text, write)
        with text.block("if KEEP:"):
            text.add(
                f"row = S - tl.minimum(S, {ring}) + i * {block} + r",
                f"slot = (length + row) % {ring}",
            )
            with text.block(one):
                _places(text, write)
                text.add(
                    "kept = tl.load(x_rows + row[:, None] * x_s2 + d[None, :] * x_s3, mask=(row < S)[:, None])",
                    f"tl.store(recent_ptr + (at * {ring} + slot)[:, None] * {write.head} + d[None, :], kept, "
                    "mask=(row < S)[:, None])",
                )
        with text.block("if CODE:"):
            past = lambda n: f"tl.maximum(tl.minimum({n}, T) - {ring - block}, 0) // {block}"
            text.add(f"b = {past('length')} + i")
            with text.block(f"if b < {past('length + S')}:"):
                text.add(f"t = b * {block} + r")
                if write.mean:
                    text.add(f"centre = tl.zeros(({block}, {write.head}), tl.float32)")
                    with text.block(one):
                        _places(text, write)
                        _rows(text, write)
                        text.add("centre += rows")
                    text.add(
                        f"centre = (centre / heads).to({_type(write.stored)})",
                        f"tl.store(mean_ptr + (pid * T + t)[:, None] * {write.head} + d[None, :], centre)",
                    )
                with text.block(one):
                    _places(text, write)
                    _rows(text, write)
                    _code(text, write)
    return str(text), parameters


def _head(text: Text, write: Write) -> str | None:
    """The head of the loop over heads, where there is one."""
    if write.mean:
        return "for h in range(0, heads):"
    text.add("batch = pid // heads", "h = pid % heads")
    return None


def _places(text: Text, write: Write) -> None:
    if write.mean:
        text.add("at = pid * heads + h", "x_rows = x_ptr + pid * x_s0 + h * x_s1")
    else:
        text.add("at = pid", "x_rows = x_ptr + batch * x_s0 + h * x_s1")


def _rows(text: Text, write: Write) -> None:
    """rows: the block's tokens, float32."""
    old = f"recent_ptr + (at * {write.recent} + t % {write.recent})[:, None] * {write.head} + d[None, :]"
    new = "x_rows + (t - length)[:, None] * x_s2 + d[None, :] * x_s3"
    text.add(
        f"rows = {load(old, ('(t < length)[:, None]',))}.to(tl.float32)",
        f"rows += {load(new, ('(t >= length)[:, None]',))}.to(tl.float32)",
    )


def _code(text: Text, write: Write) -> None:
    scheme, block, head = write.scheme, write.block, write.head
    stored = _type(write.stored)
    if write.mean:
        text.add("rows = rows - centre.to(tl.float32)")
    if scheme.by_channel:
        group = scheme.tokens(block)
        shape, axis, spread = (block // group, group, head), 1, "[:, None, :]"
        text.add(f"g = b * {block // group} + tl.arange(0, {block // group})")
        place = f"(at * (T // {group}) + g)[:, None] * {head} + d[None, :]"
    else:
        group = scheme.channels(head)
        shape, axis, spread = (block, head // group, group), 2, "[:, :, None]"
        place = f"(at * T + t)[:, None] * {head // group} + tl.arange(0, {head // group})[None, :]"
    text.add(f"x = tl.reshape(rows, {shape})", f"wrong = tl.sum(x * 0.0, {axis})  # NaN where a number is not finite")
    if scheme.low:
        text.add(
            f"low = tl.min(x, {axis}).to({stored})",
            f"tl.store(low_ptr + {place}, low)",
            f"reach = tl.max(x, {axis}) - low.to(tl.float32) + wrong",
            f"x = x - low.to(tl.float32){spread}",
        )
        top = 2.0**scheme.bits - 1
    else:
        text.add(f"reach = tl.max(tl.abs(x), {axis}) + wrong")
        top = E4M3_TOP if scheme.format == "fp8" else 2.0 ** (scheme.bits - 1) - 1
    text.add(
        f"scale = tl.div_rn(reach, tl.full(reach.shape, {top!r}, tl.float32)).to({stored})",
        "scale = tl.where(scale == 0.0, 1.0, scale)",
        'scale = tl.where(tl.abs(reach) < float("inf"), scale, float("nan"))',
        f"scale = scale.to({stored})",
        f"tl.store(scale_ptr + {place}, scale)",
        f"x = tl.div_rn(x, tl.broadcast_to(scale.to(tl.float32){spread}, {shape}))",
        "x = tl.where(x == x, x, 0.0)",
    )
    if scheme.format == "fp8":
        _e4m3(text)
    else:
        least = 0.0 if scheme.low else -top
        text.add(f"x = tl.minimum(tl.maximum((x + {ROUND!r}) - {ROUND!r}, {least!r}), {top!r})")
        text.add(f"c = (x{'' if scheme.low else f' + {2.0 ** (scheme.bits - 1)!r}'}).to(tl.int32)")
    _store(text, write)


def _e4m3(text: Text) -> None:
    """Nearest, half to even: in the float's own bits, or, below 2^-6, in those of 2^14 + |x|, whose step is 2^-9."""
    text.add(
        f"x = tl.minimum(tl.maximum(x, {-E4M3_TOP!r}), {E4M3_TOP!r})",
        "word = x.to(tl.int32, bitcast=True)",
        "size = word & 0x7FFFFFFF",
        "normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - 960",
        "small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 255",
        "c = tl.where(tl.abs(x) < 0.015625, small, normal) | ((word >> 24) & 128)",
    )


def _store(text: Text, write: Write) -> None:
    """Bytes of several planes: channels of a token for keys, tokens of a channel for values."""
    block, head, bits = write.block, write.head, write.scheme.bits
    planes = 8 // bits
    shift = f"(tl.arange(0, {planes}) * {bits})"
    if write.values:
        sub = block // planes
        if planes > 1:
            text.add(f"c = tl.sum(tl.reshape(c, ({planes}, {sub}, {head})) << {shift}[:, None, None], 0)")
        else:
            text.add(f"c = tl.reshape(c, ({sub}, {head}))")
        place = f"(at * blocks + b) * {head * sub} + d[None, :] * {sub} + tl.arange(0, {sub})[:, None]"
    else:
        row = head // planes
        if planes > 1:
            text.add(f"c = tl.sum(tl.reshape(c, ({block}, {planes}, {row})) << {shift}[None, :, None], 1)")
        else:
            text.add(f"c = tl.reshape(c, ({block}, {row}))")
        place = f"(at * T + t)[:, None] * {row} + tl.arange(0, {row})[None, :]"
    text.add(f"tl.store(codes_ptr + {place}, c.to(tl.uint8))")


def _type(dtype: torch.dtype) -> str:
    return {torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}[dtype]
