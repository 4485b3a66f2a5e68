"""The text of the kernel that attends over a cache of codes: `cached.py` says what it is for and launches it.

    program (sequence and key head, part):  part < splits − 1: a share of the coded blocks; the last one: the ring

A block is BLOCK tokens. The bytes of its values hold tokens of several planes, so its keys are taken in as many
sub-tiles: logits of sub-tile u meet plane u of the values.

What a block needs is copied stages ahead by Triton, but for tiles of fewer than four bytes a thread: several scales and
lows of few tokens. Those are read a block ahead, each as soon as that of this block has been used, where there are few:
more would take the registers that let programs share a multiprocessor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...compiler.cached import CacheScheme
from ..kernel_text import call
from .cached_numbers import numbers
from .config import next_power_of_two
from .decode import LOG2_E
from .text import Text, joined, load

RING_TILE = 32
THREADS = 128  # of a program: `cached.WARPS` warps
AHEAD_MOST = 16  # tiles that are read a block ahead; with 32 (int2 keys in groups of 16) registers spill


@dataclass(frozen=True)
class Split:
    """What the kernel is specialised for.

    head, head_v: dimensions of keys and of values; recent: rows of the ring; mask: its dtype or None.
    """

    head: int
    head_v: int
    dtype: torch.dtype
    keys: CacheScheme
    values: CacheScheme
    k_mean: bool
    v_mean: bool
    block: int
    recent: int
    mask: torch.dtype | None
    kind: str
    scale: float
    softcap: float

    @property
    def planes(self) -> int:
        """Tokens in a byte of values: sub-tiles of a block."""
        return 8 // self.values.bits

    @property
    def sub(self) -> int:
        """Tokens of a sub-tile."""
        return self.block // self.planes

    @property
    def row(self) -> int:
        """Bytes of a row of keys."""
        return self.head * self.keys.bits // 8

    @property
    def tensors(self) -> list[str]:
        """The cache's tensors that are read, as `cache_attention` names them."""
        names = []
        for side, scheme, mean in (("k", self.keys, self.k_mean), ("v", self.values, self.v_mean)):
            parts = ["codes", "scale", *(["low"] if scheme.low else []), *(["mean"] if mean else []), "recent"]
            names += [f"{side}_{part}" for part in parts]
        return names

    @property
    def parameters(self) -> list[str]:
        masks = ["mask"] if self.mask is not None else []
        names = ["q_ptr", *(f"{t}_ptr" for t in self.tensors), "length_ptr", *(f"{m}_ptr" for m in masks)]
        names += ["parts_ptr", "stats_ptr", *(f"{a}_s{i}" for a in ("q", *masks) for i in range(4))]
        names += ["heads", "S", "blocks", "G", "splits"]
        return names + {"full": [], "causal": ["offset"], "sliding": ["offset", "window"]}[self.kind]


CONSTANTS = ("ROWS", "PTX")


def split_kernel(name: str, split: Split) -> tuple[str, list[str]]:
    """The source and its parameters. Grid: (batch times key heads, splits); `decode.join_kernel` joins the parts."""
    writer = _Writer(split)
    text = writer.text
    parameters = [*split.parameters, *CONSTANTS]
    text.add(
        "@triton.jit",
        *call(f"def {name}(", [*split.parameters, *(f"{c}: tl.constexpr" for c in CONSTANTS)], "):"),
    )
    with text.indented():
        writer.head()
        with text.block("if part < splits - 1:"):
            writer.codes()
        with text.block("else:"):
            writer.ring()
        writer.tail()
    return str(text), parameters


@dataclass(frozen=True)
class _Read:
    """Scales or lows of sub-tile u.

    load: what reads them; in it {tokens} are the sub-tile's and {first} the first of them, {block} that of the block.
    spread: a tile that broadcasts to that of the codes; in it {read} is what was read. name: of the tile.
    early: whether they are read a block ahead.
    """

    u: int
    name: str
    load: str
    spread: str
    early: bool = False


def _parts(scheme: CacheScheme) -> dict[str, str]:
    """What is done with a code's number: scale and low, and their operators."""
    return {"scale": "*", "low": "+"} if scheme.low else {"scale": "*"}


class _Writer:
    def __init__(self, split: Split):
        self.split, self.text = split, Text()
        self.wide, self.wide_v = (next_power_of_two(max(n, 16)) for n in (split.head, split.head_v))
        self.wide_row = next_power_of_two(max(split.row, 16))
        self.in_d = f"d < {split.head}" if self.wide != split.head else None
        self.in_dv = f"dv < {split.head_v}" if self.wide_v != split.head_v else None
        self.in_j = f"j < {split.row}" if self.wide_row != split.row else None
        self.fetches = False
        self.precision = ', input_precision="ieee"' if split.dtype == torch.float32 else ""

    def head(self) -> None:
        split, text = self.split, self.text
        text.add(
            "pid = tl.program_id(0).to(tl.int64)",
            "part = tl.program_id(1)",
            "batch = pid // heads",
            "row = tl.arange(0, ROWS)",
            "query = row // G",
            "head = pid % heads * G + row % G",
            "inside_row = row < S * G",
            f"dv = tl.arange(0, {self.wide_v})",
            "q_rows = q_ptr + batch * q_s0 + head * q_s1 + query * q_s2",
        )
        if split.mask is not None:
            text.add("mask_rows = mask_ptr + batch * mask_s0 + head * mask_s1 + query * mask_s2")
        text.add(
            f"T = blocks * {split.block}",
            "length = tl.minimum(tl.load(length_ptr), T).to(tl.int32)",
            f"coded = tl.maximum(length - {split.recent - split.block}, 0) // {split.block} * {split.block}",
            'top = tl.full((ROWS,), float("-inf"), tl.float32)',
            "total = tl.zeros((ROWS,), tl.float32)",
            f"acc = tl.zeros((ROWS, {self.wide_v}), tl.float32)",
        )

    def codes(self) -> None:
        """A share of the coded blocks."""
        split, text = self.split, self.text
        text.add(
            f"j = tl.arange(0, {self.wide_row})",
            f"token = tl.arange(0, {split.sub})",
            f"share = tl.cdiv(coded // {split.block}, splits - 1) * {split.block}",
            "first = part * share",
            f"k_rows = k_codes_ptr + pid * T * {split.row} + j[None, :]",
            f"v_rows = v_codes_ptr + pid * T * {split.head_v * split.values.bits // 8}"
            f" + dv[:, None] * {split.sub} + token[None, :]",
        )
        for plane in range(8 // split.keys.bits):
            pointer = f"q_rows[:, None] + ({plane * split.row} + j)[None, :] * q_s3"
            text.add(f"q{plane} = {load(pointer, ('inside_row[:, None]', self._columns(self.in_j)))}")
        self._whole_query(split.k_mean)
        reads = {keys: [one for one in self._reads(keys) if one.early] for keys in (True, False)}
        self.fetches = sum(map(len, reads.values())) <= AHEAD_MOST
        reads = reads if self.fetches else {True: [], False: []}
        if any(reads.values()):
            text.add(f"ahead = tl.maximum(tl.minimum(first, coded - {split.block}), 0)")  # it may have no share
            self._fetch([*reads[True], *reads[False]])
        with text.block(f"for start in range(first, tl.minimum(first + share, coded), {split.block}):"):
            subs = range(split.planes)
            if any(reads.values()):
                text.add(f"ahead = tl.minimum(start + {split.block}, coded - {split.block})")
            for u in subs:
                text.add(f"t{u} = start + {u * split.sub} + token")
                at = f"k_rows + t{u}[:, None] * {split.row}"
                text.add(f"k{u} = {load(at, (self._columns(self.in_j),), '0')}")
            at = f"v_rows + start * {split.head_v * split.values.bits // 8}"
            text.add(f"v = {load(at, (self._rows(self.in_dv),), '0')}")
            for u in subs:
                self._logits(u)
            self._fetch(reads[True])
            for u in subs:
                text.add(f"higher = tl.maximum({'higher' if u else 'top'}, tl.max(x{u}, 1))")
            self._fade()
            for u in subs:
                text.add(f"p{u} = tl.exp2(x{u} - level[:, None])", f"total += tl.sum(p{u}, 1)")
                self._values(u)
            self._fetch(reads[False])

    def _reads(self, keys: bool) -> Iterator[_Read]:
        """The scales and lows of a block, of keys or of values."""
        split = self.split
        scheme = split.keys if keys else split.values
        for u in range(split.planes):
            for plane in range(8 // scheme.bits) if keys else (u,):
                for part in _parts(scheme):
                    yield self._of_keys(part, u, plane) if keys else self._of_values(part, u)

    def _fetch(self, reads: list[_Read]) -> None:
        """Reads scales and lows of the block at `ahead`."""
        for one in reads:
            first = f"ahead + {one.u * self.split.sub}"
            loaded = one.load.format(tokens=f"({first} + token)", first=f"({first})", block="ahead")
            self.text.add(f"{one.name}_raw = {loaded}")

    def _logits(self, u: int) -> None:
        """x<u>: the logits of a sub-tile, in units of log 2, hidden ones minus infinity."""
        split, text = self.split, self.text
        for plane in range(8 // split.keys.bits):
            name = f"k{u}_{plane}"
            numbers(text, name, f"k{u}", plane, split.keys, split.dtype)
            for part, sign in _parts(split.keys).items():
                self._bring_in(name, sign, self._of_keys(part, u, plane))
            sum_ = f", acc=x{u}" if plane else ""
            text.add(f"x{u} = tl.dot(q{plane}, tl.trans({name}){sum_}{self.precision})")
        if split.k_mean:
            at = f"k_mean_ptr + (batch * T + t{u})[:, None] * {split.head} + d[None, :]"
            text.add(f"mean = {load(at, (self._columns(self.in_d),))}")
            text.add(f"x{u} = tl.dot(q, tl.trans(mean), acc=x{u}{self.precision})")
        self._hide(f"x{u}", f"t{u}", None)

    def _bring_in(self, numbers: str, sign: str, one: _Read) -> None:
        """Multiplies by scales, or adds lows."""
        first = f"(start + {one.u * self.split.sub})"
        read = f"{one.name}_raw"
        if not (one.early and self.fetches):
            read = one.load.format(tokens=f"t{one.u}", first=first, block="start")
        self.text.add(f"{one.name} = {one.spread.format(read=read)}", f"{numbers} = {numbers} {sign} {one.name}")

    def _is_early(self, *tile: int) -> bool:
        """Whether a tile is fewer than four bytes a thread, the least that is copied by itself."""
        return math.prod(tile) * self.split.dtype.itemsize < 4 * THREADS

    def _of_keys(self, part: str, u: int, plane: int) -> _Read:
        """The scale or low of each channel and token of a sub-tile."""
        split, scheme, pointer, name = self.split, self.split.keys, f"k_{part}_ptr", f"k{u}_{plane}_{part}"
        if scheme.by_channel:
            group = scheme.tokens(split.block)
            base = f"{pointer} + pid * (T // {group}) * {split.head} + {plane * split.row}"
            first = "{block}" if group == split.block else "{first}"
            if group >= split.sub:
                at = f"{base} + {first} // {group} * {split.head} + j"
                return _Read(u, name, load(at, (self.in_j,)), "{read}[None, :]")
            groups = split.sub // group
            at = f"{base} + ({first} // {group} + tl.arange(0, {groups}))[:, None] * {split.head} + j[None, :]"
            spread, early = _spread("{read}", (groups, group, self.wide_row), 1), self._is_early(groups, self.wide_row)
            return _Read(u, name, load(at, (self._columns(self.in_j),)), spread, early)
        group = scheme.channels(split.head)
        count = split.head // group
        at = f"{pointer} + (pid * T + {{tokens}}) * {count}"
        if group >= split.row:
            return _Read(u, name, f"tl.load({at} + {plane * split.row // group})", "{read}[:, None]")
        groups = split.row // group
        at = f"({at} + {plane * groups})[:, None] + tl.arange(0, {groups})[None, :]"
        spread = _spread("{read}", (split.sub, groups, group), 2)
        return _Read(u, name, f"tl.load({at})", spread, self._is_early(split.sub, groups))

    def _of_values(self, part: str, u: int) -> _Read:
        """The same of the values of plane u, which lie channel by channel."""
        split, name = self.split, f"v{u}_{part}"
        group = split.values.channels(split.head_v)
        count = split.head_v // group
        at = f"v_{part}_ptr + (pid * T + {{tokens}})"
        if count == 1:
            return _Read(u, name, f"tl.load({at})", "{read}[None, :]")
        groups = self.wide_v // group
        inside = (f"(tl.arange(0, {groups}) < {count})[:, None]",) if groups != count else ()
        at = f"{at}[None, :] * {count} + tl.arange(0, {groups})[:, None]"
        spread = _spread("{read}", (groups, group, split.sub), 1)
        return _Read(u, name, load(at, inside), spread, self._is_early(groups, split.sub))

    def _values(self, u: int) -> None:
        """Adds the values of plane u."""
        split, text, scheme = self.split, self.text, self.split.values
        numbers(text, f"v{u}", "v", u, scheme, split.dtype)
        for part, sign in _parts(scheme).items():
            self._bring_in(f"v{u}", sign, self._of_values(part, u))
        text.add(f"acc = tl.dot(p{u}.to(v{u}.dtype), tl.trans(v{u}), acc=acc{self.precision})")
        if split.v_mean:
            at = f"v_mean_ptr + (batch * T + t{u})[:, None] * {split.head_v} + dv[None, :]"
            text.add(f"mean = {load(at, (self._columns(self.in_dv),))}")
            text.add(f"acc = tl.dot(p{u}.to(mean.dtype), mean, acc=acc{self.precision})")

    def ring(self) -> None:
        """The newest tokens, which lie in the ring as they came: row p % R holds position p."""
        split, text, rows = self.split, self.text, self.split.recent
        self._whole_query(True)
        with text.block(f"for r0 in range(0, {rows}, {RING_TILE}):"):
            text.add(f"slot = r0 + tl.arange(0, {RING_TILE})")
            text.add(f"t = length - 1 - (length - 1 - slot + {2 * rows}) % {rows}")
            text.add(f"inside = (t >= coded) & (slot < {rows})")
            at = f"k_recent_ptr + (pid * {rows} + slot)[:, None] * {split.head} + d[None, :]"
            text.add(f"k = {load(at, ('inside[:, None]', self._columns(self.in_d)))}")
            at = f"v_recent_ptr + (pid * {rows} + slot)[:, None] * {split.head_v} + dv[None, :]"
            text.add(f"v = {load(at, ('inside[:, None]', self._columns(self.in_dv)))}")
            text.add(f"x = tl.dot(q, tl.trans(k){self.precision})")
            self._hide("x", "t", "inside[None, :]")
            text.add("higher = tl.maximum(top, tl.max(x, 1))")
            self._fade()
            text.add(
                "p = tl.exp2(x - level[:, None])",
                "total += tl.sum(p, 1)",
                f"acc = tl.dot(p.to(v.dtype), v, acc=acc{self.precision})",
            )

    def tail(self) -> None:
        """Unnormalised sums, and of each row its maximum and its sum of exponentials."""
        at = f"parts_ptr + slot[:, None] * {self.split.head_v} + dv[None, :]"
        self.text.add(
            "slot = (pid * splits + part) * (S * G) + row",
            f"tl.store({at}, acc{joined(('inside_row[:, None]', self._columns(self.in_dv)))})",
            "tl.store(stats_ptr + slot, top, mask=inside_row)",
            "count = tl.num_programs(0).to(tl.int64) * splits * (S * G)",
            "tl.store(stats_ptr + count + slot, total, mask=inside_row)",
        )

    def _whole_query(self, wanted: bool) -> None:
        if wanted:
            self.text.add(f"d = tl.arange(0, {self.wide})")
            at = "q_rows[:, None] + d[None, :] * q_s3"
            self.text.add(f"q = {load(at, ('inside_row[:, None]', self._columns(self.in_d)))}")

    def _hide(self, x: str, t: str, inside: str | None) -> None:
        """Scales and caps the logits x of tokens t, and hides what the mask and its kind hide."""
        split, text = self.split, self.text
        if split.softcap:
            text.add(
                f"{x} = {split.softcap * LOG2_E} * (1 - 2 / (tl.exp({x} * {2 * split.scale / split.softcap}) + 1))"
            )
        else:
            text.add(f"{x} = {x} * {split.scale * LOG2_E}")
        conditions = list(self._conditions(t)) + ([inside] if inside else [])
        if split.mask is not None:
            at = f"mask_rows[:, None] + {t}.to(tl.int64)[None, :] * mask_s3"
            inside_both = ("inside_row[:, None]", inside)
            if split.mask == torch.bool:
                conditions.append(f"({load(at, inside_both, '0')} != 0)")
            else:
                # A mask's most negative number must not become minus infinity: a row that has nothing else weighs its
                # keys alike.
                text.add(
                    f"bias = {load(at, inside_both)}.to(tl.float32)",
                    f"{x} += tl.maximum(bias * {LOG2_E}, {torch.finfo(torch.float32).min})",
                )
                conditions.append('(bias != float("-inf"))')
        if conditions:
            text.add(f'{x} = tl.where({" & ".join(conditions)}, {x}, float("-inf"))')

    def _conditions(self, t: str) -> Iterator[str]:
        if self.split.kind != "full":
            yield f"({t}[None, :] <= query[:, None] + offset)"
        if self.split.kind == "sliding":
            yield f"({t}[None, :] > query[:, None] + offset - window)"

    def _fade(self) -> None:
        self.text.add(
            'level = tl.where(higher == float("-inf"), 0.0, higher)',
            "fade = tl.exp2(top - level)",
            "total = total * fade",
            "acc = acc * fade[:, None]",
            "top = higher",
        )

    @staticmethod
    def _columns(condition: str | None) -> str | None:
        return condition and f"({condition})[None, :]"

    @staticmethod
    def _rows(condition: str | None) -> str | None:
        return condition and f"({condition})[:, None]"


def _spread(loaded: str, shape: tuple[int, int, int], axis: int) -> str:
    """A tile that lacks `axis` of shape, repeated along it, as a tile of two dimensions: groups and their members."""
    index = {1: "[:, None, :]", 2: "[:, :, None]"}[axis]
    flat = (shape[0] * shape[1], shape[2]) if axis == 1 else (shape[0], shape[1] * shape[2])
    return f"tl.reshape(tl.broadcast_to({loaded}{index}, {shape}), {flat})"
