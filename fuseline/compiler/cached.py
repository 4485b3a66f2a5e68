"""Keys and values of a cache as codes: formats, how codes lie in memory, and which tokens are coded yet.

A cache of T tokens is coded in blocks. The newest tokens stay as they came, in a ring of `window + block` rows; when a
block lies wholly before the last `window` tokens, it is coded as a whole:

    |  block 0  |  block 1  |  ring: between window and window + block tokens  |
    0                  coded(length)                                       length

Keys are read row by row, so a byte holds channels of one token: byte j of a row of P = D·bits / 8 bytes has channel
i·P + j in its bits i·bits … Values are summed over tokens, so within a block the bytes of a channel hold its tokens, in
the same order: [D, block·bits / 8].

x̂ = code·scale + low, where `low` is the group's least number. A group of equal numbers has scale 1 and is exact; a NaN
or an infinity makes the scale, and so the group, NaN. Without `low`, integers are symmetric around 0. Scales and lows
have the dtype of the keys and values.

Sources: KIVI (Liu et al., 2024), keys by channel and values by token behind a window; MiniKV (Sharma et al., 2025), the
same at 2 bits in groups of 16; TaDA (Joshi et al., 2025), deviations from the mean over heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .errors import UserError, nearest
from .formats.quotient import quotient

BITS = {"int8": 8, "int4": 4, "int2": 2, "fp8": 8}
BLOCKS = (32, 64, 128)
E4M3_TOP = 448.0


@dataclass(frozen=True)
class CacheScheme:
    """How keys or values are coded.

    format: a name of BITS; by_channel: scales of a channel for `group` tokens, else of a token for `group` channels
    (0: all of a head); low: whether a group's least number is kept, else integers are symmetric.
    """

    format: str
    by_channel: bool = False
    group: int = 0
    low: bool = True

    @staticmethod
    @cache
    def parse(text: str) -> CacheScheme:
        """`int4:channel:g32`, `int4:token:g64`, `int2:channel:g16`, `int8:token:sym`, `fp8:token`.

        Raises:
            UserError: no such format or part.
        """
        form, *parts = text.split(":")
        form = {"e4m3": "fp8"}.get(form, form)
        if form not in BITS:
            raise UserError(
                f"a cache holds no codes of {form!r}{nearest(form, BITS)}",
                remedy="int8, int4, int2 or fp8, as in int4:channel:g64",
            )
        by_channel, group, low = False, 0, form != "fp8"
        for part in parts:
            if part in ("channel", "token"):
                by_channel = part == "channel"
            elif part[:1] == "g" and part[1:].isdecimal() and int(part[1:]):
                group = int(part[1:])
            elif part in ("sym", "asym") and form != "fp8":
                low = part == "asym"
            else:
                raise UserError(
                    f"{text!r} has no part {part!r}",
                    remedy="FORMAT[:channel|:token][:gN][:sym], as in int4:channel:g64",
                )
        return CacheScheme(form, by_channel, group, low)

    def __str__(self) -> str:
        parts = [self.format, "channel" if self.by_channel else "token"]
        parts += [f"g{self.group}"] if self.group else []
        parts += ["sym"] if not self.low and self.format != "fp8" else []
        return ":".join(parts)

    @property
    def bits(self) -> int:
        return BITS[self.format]

    def refuse(self, head: int, block: int, values: bool) -> str | None:
        """Why heads of so many channels cannot be coded so."""
        planes, along = 8 // self.bits, block if values else head
        if block not in BLOCKS:
            return f"blocks of {block} tokens: there are {', '.join(map(str, BLOCKS))}"
        if values and self.by_channel:
            return "values take a scale a token, since attention sums over tokens: token, not channel"
        if along % planes:
            return f"{along} {'tokens of a block' if values else 'channels'} do not fill bytes of {planes} codes"
        if self.by_channel and block % self.tokens(block):
            return f"groups of {self.group} tokens do not divide blocks of {block}"
        if not self.by_channel and head % self.channels(head):
            return f"groups of {self.group} channels do not divide heads of {head}"
        return None

    def tokens(self, block: int) -> int:
        """Tokens that share a scale, by channel: a whole block where no group is named."""
        return self.group or block

    def channels(self, head: int) -> int:
        """Channels that share a scale, by token."""
        return self.group or head

    def shapes(self, heads: int, capacity: int, head: int, block: int, values: bool) -> dict[str, tuple[int, ...]]:
        """Shapes of `codes` (uint8), and of `scale` and `low`, behind the batch."""
        row = head * self.bits // 8
        codes = (heads, capacity // block, head, block * self.bits // 8) if values else (heads, capacity, row)
        by_channel = (heads, capacity // self.tokens(block), head)
        scale = by_channel if self.by_channel else (heads, capacity, head // self.channels(head))
        return {"codes": codes, "scale": scale, **({"low": scale} if self.low else {})}


def coded(length: Any, window: int, block: int) -> Any:
    """How many of `length` tokens are coded; an int or an integer tensor."""
    past = length - window
    return (past.clamp(min=0) if isinstance(past, torch.Tensor) else max(past, 0)) // block * block


def encode(x: torch.Tensor, scheme: CacheScheme, stored: torch.dtype) -> dict[str, torch.Tensor]:
    """Blocks x [..., block, D] in float32 or wider → `codes` uint8 [..., block, D], `scale`, and `low` if it is kept.

    Scales are [..., block / group, D] by channel and [..., block, D / group] by token, rounded to `stored` before codes
    are chosen.
    """
    block, head = x.shape[-2:]
    if scheme.by_channel:
        groups, along = x.unflatten(-2, (-1, scheme.tokens(block))), -2
    else:
        groups, along = x.unflatten(-1, (-1, scheme.channels(head))), -1
    found: dict[str, torch.Tensor] = {}
    if scheme.low:
        low = groups.amin(along, keepdim=True).to(stored).to(x.dtype)
        reach, top = groups.amax(along, keepdim=True) - low, 2.0**scheme.bits - 1
        found["low"], groups = low, groups - low
    else:
        reach, top = groups.abs().amax(along, keepdim=True), _top(scheme)
    scale = quotient(reach, top).to(stored).to(x.dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scale = torch.where(reach.isfinite(), scale, torch.full_like(scale, torch.nan))
    codes = _codes((groups / scale).nan_to_num(0.0, 0.0, 0.0), scheme)
    found |= {"scale": scale, "codes": codes.reshape(x.shape)}
    return {name: part if name == "codes" else part.squeeze(along).to(stored) for name, part in found.items()}


def _top(scheme: CacheScheme) -> float:
    return E4M3_TOP if scheme.format == "fp8" else 2.0 ** (scheme.bits - 1) - 1


def _codes(scaled: torch.Tensor, scheme: CacheScheme) -> torch.Tensor:
    if scheme.format == "fp8":
        return scaled.clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).view(torch.uint8)
    if scheme.low:
        return scaled.round().clamp(0, 2**scheme.bits - 1).to(torch.uint8)
    return (scaled.round().clamp(-_top(scheme), _top(scheme)) + 2 ** (scheme.bits - 1)).to(torch.uint8)


def _numbers(codes: torch.Tensor, scheme: CacheScheme, dtype: torch.dtype) -> torch.Tensor:
    if scheme.format == "fp8":
        return codes.view(torch.float8_e4m3fn).to(dtype)
    return codes.to(dtype) - (0 if scheme.low else 2 ** (scheme.bits - 1))


def pack(codes: torch.Tensor, bits: int, values: bool) -> torch.Tensor:
    """Codes uint8 [..., block, D] → bytes [..., block, P] of keys, [..., D, block·bits / 8] of values."""
    rows = (codes.transpose(-1, -2) if values else codes).unflatten(-1, (8 // bits, -1))
    packed = rows[..., 0, :].clone()
    for plane in range(1, 8 // bits):
        packed |= rows[..., plane, :] << bits * plane
    return packed


def unpack(packed: torch.Tensor, bits: int, values: bool) -> torch.Tensor:
    """The inverse of `pack`."""
    rows = torch.cat([packed >> bits * plane & 2**bits - 1 for plane in range(8 // bits)], -1)
    return rows.transpose(-1, -2) if values else rows


@dataclass(frozen=True)
class Side:
    """The keys or the values of one layer's cache, B sequences of H heads; all but `length` is written in place.

    codes, scale, low: behind the batch as `CacheScheme.shapes` says. mean: [B, 1, T, D], the mean over heads that was
    taken from each token before it was coded, or None. recent: the ring, [B, H, window + block, D], in the dtype of
    keys and values; position p lies in row p % (window + block).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    low: torch.Tensor | None
    mean: torch.Tensor | None
    recent: torch.Tensor
    scheme: CacheScheme
    block: int
    values: bool

    @property
    def capacity(self) -> int:
        return self.codes.shape[2] * (self.block if self.values else 1)

    @property
    def ring(self) -> int:
        return self.recent.shape[2]

    def coded(self, length: torch.Tensor) -> torch.Tensor:
        """How many tokens are coded when there are `length`."""
        return coded(length.clamp(max=self.capacity), self.ring - self.block, self.block)

    def write(self, x: torch.Tensor, length: torch.Tensor) -> None:
        """Adds tokens x [B, H, S, D] behind the first `length`, and codes the blocks that they complete.

        Nothing here depends on the number in `length` but indices, so it runs without waiting for a device.
        """
        batch, heads, added, head = x.shape
        length = length.reshape(())
        if not added:
            return
        blocks = self.capacity // self.block
        count = min(-(-added // self.block), blocks)
        first = self.coded(length) // self.block
        # The blocks behind the last complete one are written back as they are, each at a place of its own.
        at = (first + torch.arange(count, device=x.device)) % blocks
        done = first + torch.arange(count, device=x.device) < self.coded(length + added) // self.block
        t = at[:, None] * self.block + torch.arange(self.block, device=x.device)
        older = self.recent[:, :, t % self.ring]
        newer = x[:, :, (t - length).clamp(0, added - 1)]
        rows = torch.where((t < length)[:, :, None], older, newer.to(older.dtype))
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        if self.mean is not None:
            centre = rows.mean(1, keepdim=True).to(self.mean.dtype)
            self._put(self.mean, centre, at, done, self.block)
            rows = rows - centre.to(rows.dtype)
        made = encode(rows, self.scheme, self.scale.dtype)
        made["codes"] = pack(made["codes"], self.scheme.bits, self.values)
        self._put(self.codes, made["codes"], at, done, 1 if self.values else self.block)
        for name in ("scale", "low"):
            place = getattr(self, name)
            if place is not None:
                self._put(place, made[name], at, done, made[name].shape[3])
        kept = min(added, self.ring)
        slots = (length + added - kept + torch.arange(kept, device=x.device)) % self.ring
        self.recent.index_copy_(2, slots, x[:, :, added - kept :].to(self.recent.dtype))

    def _put(self, place: torch.Tensor, new: torch.Tensor, at: torch.Tensor, done: torch.Tensor, rows: int) -> None:
        """Writes blocks new [B, H, n, …] to the rows `at` of `place`, of which each block has `rows`, where `done`."""
        blocks = place if rows == 1 and place.dim() == new.dim() else place.unflatten(2, (-1, rows))
        old = blocks[:, :, at]
        keep = done.view(-1, *[1] * (old.dim() - 3))
        blocks.index_copy_(2, at, torch.where(keep, new.reshape(old.shape).to(old.dtype), old))

    def read(self, length: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """All tokens in order, [B, H, T, D] in `dtype`, computed in float32 at least; zeros from `length` on."""
        dtype = dtype or self.recent.dtype
        compute = torch.promote_types(torch.promote_types(self.recent.dtype, torch.float32), dtype)
        length, scheme = length.reshape(()), self.scheme
        codes = unpack(self.codes, scheme.bits, self.values)
        x = _numbers(codes.flatten(2, 3) if self.values else codes, scheme, compute)
        groups = x.unflatten(2, (-1, scheme.tokens(self.block))) if scheme.by_channel else x
        groups = groups if scheme.by_channel else groups.unflatten(3, (-1, scheme.channels(x.shape[3])))
        along = 3 if scheme.by_channel else 4
        groups = groups * self.scale.to(compute).unsqueeze(along)
        if self.low is not None:
            groups = groups + self.low.to(compute).unsqueeze(along)
        x = groups.reshape(x.shape)
        if self.mean is not None:
            x = x + self.mean.to(compute)
        t = torch.arange(self.capacity, device=x.device)
        recent = self.recent[:, :, t % self.ring].to(compute)
        x = torch.where((t < self.coded(length))[:, None], x, recent)
        return torch.where((t < length)[:, None], x, torch.zeros_like(x)).to(dtype)
