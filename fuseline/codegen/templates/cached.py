"""The template of attention over a cache of codes: `emit_cached`, flash decoding that reads codes.

A decode step is bound by the bytes of keys and values, which are here the codes with their scales. Coded blocks are
divided evenly among programs by the number of tokens that lie in the cache now, which stays on the device, so that one
launch, or one CUDA graph, serves every length. One program more a head takes the ring of newest tokens. Codes become
numbers in registers, `cached_numbers.py`, and go to the tensor cores; the query heads of one key head, padded to 16
rows, share them. `decode.join_kernel` joins the parts. With more rows than a program holds, the op's naive twin runs.

What the step adds to the cache stands in the same region, `cached_update.py`.

Sources: flash decoding (Dao et al., 2023) for the split; KIVI (Liu et al., 2024) for codes beside a window.

Precision: numbers are those of `cache_read` rounded to q's dtype; else as in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...compiler.cached import CacheScheme
from ...compiler.ops import cache_attention, cache_write
from ...compiler.traits import arguments
from ..about import about
from ..dtypes import is_supported, pointer_type
from ..kernel import Kernel, Launcher, Out, Refusal
from ..kernel_text import call
from ..sizes import shape
from .attention import HEAD_MAX, ROWS_MAX, buffers
from .cached_split import Split, split_kernel
from .cached_update import Update, analyse_write, launch
from .decode import join_kernel
from .text import Names, Text, is_nvidia

PROGRAMS = 396  # to divide the blocks among: three a multiprocessor of a large GPU, which holds as many at once
WARPS, STAGES = 4, 3


@dataclass(frozen=True)
class _Attention:
    """The attention of a region: its node's arguments, and what the kernels are specialised for."""

    node: Node
    given: dict[str, Any]
    split: Split

    @property
    def pointers(self) -> dict[str, Node]:
        """The tensors that the kernel reads: argument name → placeholder."""
        names = ["q", *self.split.tensors, "length", *(["mask"] if self.split.mask is not None else [])]
        return {name: self.given[name] for name in names}


def emit_cached(region: GraphModule, name: str) -> Launcher | Refusal:
    """The kernels of a region of `fuseline::cache_write`s and the `fuseline::cache_attention` behind them, and their
    host function `name`. Without an attention it returns None."""
    calls = [n for n in region.graph.nodes if n.op == "call_function"]
    writes = [n for n in calls if n.target is cache_write.overload]
    attentions = [n for n in calls if n.target is cache_attention.overload]
    if not calls or calls not in (writes, [*writes, *attentions[:1]]):
        return Refusal("the region is not an attention over a cache of codes behind what it writes to it")
    updates: list[Update] = []
    for i, node in enumerate(writes):
        update = analyse_write(node, f"{name}_write_{i}")
        if isinstance(update, Refusal):
            return update
        updates.append(update)
    attention = _analyse(attentions[0]) if attentions else None
    if isinstance(attention, Refusal):
        return attention
    kernels = {u.kernel.name: u.kernel for u in updates}
    outs: tuple[Out, ...] = ()
    if attention is not None:
        kernels |= {k.name: k for k in _kernels(attention, name)}
        b, h, s, d = shape(attention.node)
        outs = (Out("out", 0, (b, s, h, d), None, attention.node.meta["val"].dtype),)
    placeholders = [n for n in region.graph.nodes if n.op == "placeholder"]
    host = _host(placeholders, updates, attention, name, list(kernels.values()))
    return Launcher(name, host, tuple(kernels.values()), outs=outs)


def _kernels(found: _Attention, name: str) -> tuple[Kernel, ...]:
    dtype = found.given["q"].meta["val"].dtype
    split = split_kernel(f"{name}_split", found.split)
    join = join_kernel(f"{name}_join", found.split.head_v, dtype)
    dtypes = {f"{a}_ptr": pointer_type(n.meta["val"].dtype) for a, n in found.pointers.items()}
    dtypes |= {"parts_ptr": "*fp32", "stats_ptr": "*fp32", "out_ptr": dtypes["q_ptr"]}
    chosen = (("split", split, {"ROWS": 16, "PTX": False}, STAGES), ("join", join, {"SPLITS": 64, "CHUNK": 64}, 2))
    return tuple(
        Kernel(
            f"{name}_{tag}",
            source,
            {a: "constexpr" if a in constants else dtypes.get(a, "i32") for a in parameters},
            dict(constants),
            *about([found.node]),
            WARPS,
            stages,
            buffers(found.node, found.pointers, found.split.head_v, parameters),
        )
        for tag, (source, parameters), constants, stages in chosen
    )


def _analyse(node: Node) -> _Attention | Refusal:
    given = arguments(node)
    q, k, v, mask = (given[name] and given[name].meta["val"] for name in ("q", "k_recent", "v_recent", "mask"))
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Refusal(f"attention over {q.dtype}, {k.dtype} and {v.dtype}: kernels take float32, float16 or bfloat16")
    sizes = (q.shape[-1], v.shape[-1], q.shape[1], k.shape[1], k.shape[2])
    if not all(isinstance(n, int) for n in sizes) or max(sizes[:2]) > HEAD_MAX:
        return Refusal(f"heads of {sizes[0]} and {sizes[1]} dimensions, more than {HEAD_MAX} or symbolic")
    if mask is not None and not is_supported(mask.dtype):
        return Refusal(f"a mask of {mask.dtype}")
    split = Split(
        sizes[0], sizes[1], q.dtype, CacheScheme.parse(given["keys"]), CacheScheme.parse(given["values"]),
        given["k_mean"] is not None, given["v_mean"] is not None, given["block"], sizes[4],
        None if mask is None else mask.dtype, given["kind"], given["scale"], given["softcap"],
    )  # fmt: skip
    reason = _refuse(split)
    return Refusal(reason) if reason else _Attention(node, given, split)


def _refuse(split: Split) -> str | None:
    """Tiles have powers of two as their sides, and tl.dot takes 16 at least."""
    is_power = lambda n: n & (n - 1) == 0
    if split.sub < 16:
        return f"blocks of {split.block} tokens of {split.values.format} values are {split.sub} bytes, at least 16"
    if split.keys.by_channel and not is_power(split.keys.tokens(split.block)):
        return f"groups of {split.keys.group} tokens, no power of two"
    group, row = split.keys.channels(split.head), split.row
    if not split.keys.by_channel and group != split.head and not (is_power(group) and is_power(row)):
        return f"groups of {group} of {split.head} channels, no power of two"
    if split.values.channels(split.head_v) != split.head_v and not is_power(split.values.channels(split.head_v)):
        return f"groups of {split.values.group} of {split.head_v} channels, no power of two"
    return None


def _host(
    placeholders: Sequence[Node], updates: list[Update], attention: _Attention | None, name: str, kernels: list[Kernel]
) -> str:
    locals_ = ("torch", "triton", "b", "h", "s", "t", "_", "rows", "pairs", "splits", "parts", "stats", "out", "wide")
    names = Names([*locals_, name, *(k.name for k in kernels), "visible"])
    wishes = {a: wish for u in updates for wish, a in u.wishes.items() if isinstance(a, Node)}
    given = attention.given if attention else {}
    wishes |= {argument: wish for wish, argument in given.items() if isinstance(argument, Node)}
    text_of = {n: names.new(wishes.get(n, n.name)) for n in placeholders}
    value = lambda x: text_of[x] if isinstance(x, Node) else repr(x)
    text = Text()
    text.add(*call(f"def {name}(", [*(text_of[n] for n in placeholders), *(["out=None"] if attention else [])], "):"))
    with text.indented():
        for update in updates:
            update.write(text, value)
        if attention is None:
            text.add("return None")
        else:
            _attend(text, attention, value, kernels[-2:])
    return str(text)


def _attend(text: Text, attention: _Attention, value: Callable[[Any], str], kernels: Sequence[Kernel]) -> None:
    given, split = attention.given, attention.split
    q, recent, t = value(given["q"]), value(given["k_recent"]), f"{value(given['k_codes'])}.shape[2]"
    group = given["q"].meta["val"].shape[1] // given["k_recent"].meta["val"].shape[1]
    text.add(f"b, h, s, _ = {q}.shape", f"t, rows = {t}, s * {group}")
    with text.block(f"if rows > {ROWS_MAX} or b * s == 0:  # many queries: the codes are expanded"):
        text.add(*call("return torch.ops.fuseline.cache_attention.default(", [value(x) for x in given.values()], ")"))
    for tensor in split.tensors:
        text.add(f"{value(given[tensor])} = {value(given[tensor])}.contiguous()")
    text.add(
        f"pairs = b * {recent}.shape[1]",
        f"splits = min(t // {split.block}, max(1, {PROGRAMS} // pairs)) + 1  # the last one is the ring",
        f"parts = torch.empty((pairs, splits, rows, {split.head_v}), dtype=torch.float32, device={q}.device)",
        f"stats = torch.empty((2, pairs, splits, rows), dtype=torch.float32, device={q}.device)",
    )
    with text.block("if out is None:"):
        text.add(f"out = torch.empty((b, s, h, {split.head_v}), dtype={q}.dtype, device={q}.device)")
    text.add("out = out.transpose(1, 2)")
    strided = {"q": q, "out": "out"}
    if split.mask is not None:
        text.add(f"visible = {value(given['mask'])}.expand(b, h, s, t)")
        strided["mask"] = "visible"
    known = {f"{a}_ptr": value(given[a]) for a in attention.pointers} | {f"{a}_ptr": x for a, x in strided.items()}
    known |= {f"{a}_s{i}": f"{x}.stride({i})" for a, x in strided.items() for i in range(4)}
    known |= {
        "parts_ptr": "parts", "stats_ptr": "stats", "heads": f"{recent}.shape[1]", "S": "s", "H": "h",
        "blocks": f"t // {split.block}", "G": str(group), "splits": "splits", "offset": value(given["offset"]),
        "window": value(given["window"]), "ROWS": "triton.next_power_of_2(max(rows, 16))",
        "PTX": is_nvidia(q), "SPLITS": "triton.next_power_of_2(splits)",
    }  # fmt: skip
    with text.block(f"with torch.cuda.device_of({q}):"):
        for kernel, grid in zip(kernels, ("pairs, splits", "b * h * s,"), strict=True):
            launch(text, kernel, grid, known)
    text.add("return out")
