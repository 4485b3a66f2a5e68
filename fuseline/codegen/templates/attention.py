"""The template of attention for few queries: `emit_attention`, flash decoding.

A decode step's attention reads every visible key and value once and does little with them, so it is bound by their
bytes. The keys are split among programs, each with a running softmax over its part for all query heads of one key
head; a second kernel joins the parts. Blocks of keys that the mask hides from every row are not read. With more rows
than a program holds, the host function calls PyTorch's own attention.

Source: FlashAttention-2 (Dao, 2023) for the running softmax; flash decoding (Dao et al., 2023) for the split.

Precision: logits and sums are float32, probabilities are rounded to v's dtype for their product; float32 products are
IEEE. A row that sees no key gives zeros, as PyTorch's call does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...compiler.ops import find
from ...compiler.traits import arguments
from ..about import about
from ..dtypes import is_supported, pointer_type
from ..kernel import BufferUse, Kernel, Launcher, Out, Refusal
from ..kernel_text import call
from ..sizes import shape
from . import decode
from .config import next_power_of_two
from .text import Names, Text

ROWS_MAX = 64  # query rows that one program holds: queries times the query heads of one key head
PROGRAMS = 256  # programs to split the keys among: about two a multiprocessor of a large GPU
HEAD_MAX = 256
TILE_BYTES = 16384  # of keys, and of values: two stages of both fit into the shared memory of any GPU that Triton takes


@dataclass(frozen=True)
class Attention:
    """An attention region: its node's arguments, and what the kernels are specialised for."""

    node: Node
    given: dict[str, Any]
    placeholders: tuple[Node, ...]
    head: int  # dimensions of a query and a key
    head_v: int  # dimensions of a value
    mask: torch.dtype | None

    @property
    def pointers(self) -> dict[str, Node]:
        """The tensors that the kernel reads: argument name → placeholder."""
        names = ("q", "k", "v", "mask") if self.mask is not None else ("q", "k", "v")
        return {name: self.given[name] for name in names}


def emit_attention(region: GraphModule, name: str) -> Launcher | Refusal:
    """The kernels of a region that is one `fuseline::attention`, and their host function `name`."""
    attention = _analyse(region)
    if isinstance(attention, Refusal):
        return attention
    given = attention.given
    width = next_power_of_two(max(attention.head, attention.head_v)) * given["q"].meta["val"].dtype.itemsize
    block = min(64, TILE_BYTES // width)
    split_constants = {"ROWS": 16, "KEYS": block, "BLOCK_T": block}
    join_constants = {"SPLITS": 16, "CHUNK": 16}
    split = decode.split_kernel(
        f"{name}_split", attention.head, attention.head_v, given["q"].meta["val"].dtype, attention.mask,
        given["kind"], given["scale"], given["softcap"],
    )  # fmt: skip
    join = decode.join_kernel(f"{name}_join", attention.head_v, given["q"].meta["val"].dtype)
    dtypes = {f"{a}_ptr": pointer_type(n.meta["val"].dtype) for a, n in attention.pointers.items()}
    dtypes |= {"parts_ptr": "*fp32", "stats_ptr": "*fp32", "out_ptr": dtypes["q_ptr"]}
    kernels = tuple(
        Kernel(
            f"{name}_{tag}",
            source,
            {a: "constexpr" if a in constants else dtypes.get(a, "i32") for a in parameters},
            dict(constants),
            *about([attention.node]),
            4,
            2,
            buffers(attention.node, attention.pointers, attention.head_v, parameters),
        )
        for tag, (source, parameters), constants in (("split", split, split_constants), ("join", join, join_constants))
    )
    b, h, s, d = shape(attention.node)
    out = Out("out", 0, (b, s, h, d), None, attention.node.meta["val"].dtype)
    return Launcher(name, _host(attention, name, kernels), kernels, outs=(out,))


def buffers(node: Node, pointers: Mapping[str, Node], head_v: int, parameters: Sequence[str]) -> tuple[BufferUse, ...]:
    """What the kernels' pointers are; `parts` and `stats` are written by the one and read by the other."""
    parts = ("pairs", "splits", "rows", head_v)
    uses = {f"{a}_ptr": BufferUse(f"{a}_ptr", n.name, "read") for a, n in pointers.items()}
    uses["out_ptr"] = BufferUse("out_ptr", node.name, "write")
    access = "read" if "out_ptr" in parameters else "write"
    uses["parts_ptr"] = BufferUse("parts_ptr", "parts", access, parts)
    uses["stats_ptr"] = BufferUse("stats_ptr", "stats", access, (2, *parts[:3]))
    return tuple(uses[p] for p in parameters if p in uses)


def _analyse(region: GraphModule) -> Attention | Refusal:
    calls = [n for n in region.graph.nodes if n.op == "call_function"]
    op = find(calls[0].target) if len(calls) == 1 else None
    if op is None or op.name != "attention":
        return Refusal("the region is not one attention")
    (node,), given = calls, arguments(calls[0])
    if given["dropout"]:
        return Refusal("attention with dropout")
    q, k, v = (given[name].meta["val"] for name in "qkv")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return Refusal(f"attention over {q.dtype}, {k.dtype} and {v.dtype}: kernels take float32, float16 or bfloat16")
    if not isinstance(q.shape[-1], int) or not isinstance(v.shape[-1], int) or max(q.shape[-1], v.shape[-1]) > HEAD_MAX:
        return Refusal(f"heads of {q.shape[-1]} and {v.shape[-1]} dimensions, more than {HEAD_MAX} or symbolic")
    if not isinstance(q.shape[1], int) or not isinstance(k.shape[1], int):
        return Refusal("a symbolic number of heads")
    mask = given["mask"]
    if mask is not None and not is_supported(mask.meta["val"].dtype):
        return Refusal(f"a mask of {mask.meta['val'].dtype}")
    placeholders = tuple(n for n in region.graph.nodes if n.op == "placeholder")
    dtype = None if mask is None else mask.meta["val"].dtype
    return Attention(node, given, placeholders, q.shape[-1], v.shape[-1], dtype)


def _host(attention: Attention, name: str, kernels: tuple[Kernel, ...]) -> str:
    given = attention.given
    locals_ = ("torch", "triton", "b", "h", "s", "t", "_", "rows", "pairs", "keys", "splits", "parts", "stats", "out")
    names = Names([*locals_, name, *(k.name for k in kernels), "visible"])
    text_of = {n: names.new(_wish(n, given)) for n in attention.placeholders}
    value = lambda x: text_of[x] if isinstance(x, Node) else repr(x)
    q, k, v = (value(given[a]) for a in "qkv")
    group = given["q"].meta["val"].shape[1] // given["k"].meta["val"].shape[1]
    split, join = kernels
    order = ("q", "k", "v", "mask", "scale", "kind", "offset", "window", "softcap", "dropout")
    text = Text()
    text.add(*call(f"def {name}(", [*(text_of[n] for n in attention.placeholders), "out=None"], "):"))
    with text.indented():
        text.add(f"b, h, s, _ = {q}.shape", f"t, rows = {k}.shape[2], {q}.shape[2] * {group}")
        with text.block(f"if rows > {ROWS_MAX} or t == 0 or b * s == 0:  # many queries are PyTorch's"):
            text.add(*call("return torch.ops.fuseline.attention.default(", [value(given[a]) for a in order], ")"))
        block = split.constants["BLOCK_T"]
        text.add(
            f"pairs = b * {k}.shape[1]",
            f"keys = {block} * triton.next_power_of_2(triton.cdiv(t * pairs, {PROGRAMS * block}))  # of one program",
            "splits = triton.cdiv(t, keys)",
            f"parts = torch.empty((pairs, splits, rows, {attention.head_v}), dtype=torch.float32, device={q}.device)",
            f"stats = torch.empty((2, pairs, splits, rows), dtype=torch.float32, device={q}.device)",
        )
        with text.block("if out is None:"):
            text.add(f"out = torch.empty((b, s, h, {attention.head_v}), dtype={q}.dtype, device={q}.device)")
        text.add("out = out.transpose(1, 2)")
        strided = {"q": q, "k": k, "v": v, "out": "out"}
        if attention.mask is not None:
            text.add(f"visible = {value(given['mask'])}.expand(b, h, s, t)")
            strided["mask"] = "visible"
        known = {f"{a}_ptr": x for a, x in strided.items()}
        known |= {f"{a}_s{i}": f"{x}.stride({i})" for a, x in strided.items() for i in range(4)}
        known |= {"parts_ptr": "parts", "stats_ptr": "stats", "ROWS": "triton.next_power_of_2(max(rows, 16))"}
        known |= {
            "heads": f"{k}.shape[1]",
            "T": "t",
            "S": "s",
            "H": "h",
            "KEYS": "keys",
            "splits": "splits",
            "SPLITS": "triton.next_power_of_2(splits)",
        }
        known |= {"G": str(group), "offset": value(given["offset"]), "window": value(given["window"])}
        with text.block(f"with torch.cuda.device_of({q}):"):
            for kernel, grid in ((split, "pairs, splits"), (join, "b * h * s,")):
                values = [
                    f"{p}={known.get(p, kernel.constants[p])}" if p in kernel.constants else known[p]
                    for p in kernel.signature
                ]
                values += [f"num_warps={kernel.num_warps}", f"num_stages={kernel.num_stages}"]
                text.add(*call(f"{kernel.name}[({grid})](", values, ")"))
        text.add("return out")
    return str(text)


def _wish(node: Node, given: dict[str, Any]) -> str:
    for name, argument in given.items():
        if argument is node:
            return name
    return node.name
