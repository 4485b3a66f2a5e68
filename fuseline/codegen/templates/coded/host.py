"""The launcher of a region with coded weights: kernels for few rows and for many, and the host function."""

from __future__ import annotations

import re
from dataclasses import replace

import torch
from torch.fx import Node

from ...about import about
from ...dtypes import pointer_type
from ...kernel import BufferUse, Kernel, Launcher, Out, Refusal
from ...kernel_text import call
from ...sizes import size
from ..anchor import Anchor, Refused, value
from ..epilogue import check_operands
from ..signature import DECORATOR, operands, outputs
from ..text import Names, Text, is_nvidia
from .config import CodedTiling, Tile, tiling
from .kernel import Product, product_body, sum_body
from .norm import norm_kernel, width
from .values import FP8
from .weight import Coded

PAIRS = (8, 0)  # the compute capability
SUM_BLOCK = 64  # output columns of a program that adds partial sums
About = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def emit_coded(anchor: Anchor, name: str, served: About, header: str, tiles: CodedTiling | None) -> Launcher | Refusal:
    """The kernels of an anchor whose weights are all coded. served: ops, lines and makers of its products."""
    try:
        check(anchor)
        check_operands(anchor)
        target = target_of(anchor)
        tiles, whole = tiles or tiling(anchor, target), anchor
        before = [] if anchor.norm is None else [_norm(anchor, f"{name}_norm")]
        anchor = replace(anchor, norm=None)
        few, many = Product(anchor, target, tiles.few, few=True), Product(anchor, target, tiles.many)
        parts = few.apart if tiles.few.split > 1 else few
        kernels = [_kernel(parts, f"{name}_few", product_body(parts), served, header, normed=bool(before))]
        if tiles.few.split > 1:
            kernels.append(_kernel(few, f"{name}_sum", sum_body(few), served, header, SUM_BLOCK))
        if tiles.some is not None:
            some = Product(anchor, target, tiles.some)
            kernels.append(_kernel(some, f"{name}_some", product_body(some), served, header, normed=bool(before)))
        kernels.append(_kernel(many, f"{name}_many", product_body(many), served, header, normed=bool(before)))
        source, outs = _host(whole, name, tiles, tuple(kernels), few, before)
        return Launcher(name, source, (*before, *kernels), outs=outs)
    except Refused as refused:
        return Refusal(str(refused))


def check(anchor: Anchor) -> None:
    """Raises Refused for weights that do not meet in one kernel."""
    formats = {linear.weight.format for linear in anchor.linears}
    if len(formats) > 1 or not all(isinstance(linear.weight, Coded) for linear in anchor.linears):
        titles = ", ".join(dict.fromkeys(linear.weight.title for linear in anchor.linears))
        raise Refused(f"weights of several formats read by one kernel: {titles}")
    device = value(anchor.x).device
    if device.type == "cuda" and torch.cuda.is_available():
        capability = None if torch.version.hip is not None else torch.cuda.get_device_capability(device)
        reason = lacking(target_of(anchor), capability)
        if reason is not None:
            raise Refused(f"{torch.cuda.get_device_name(device)} has no products of {reason}")


def lacking(target: torch.dtype, capability: tuple[int, int] | None) -> str | None:
    """Why a GPU of that compute capability (None: one of AMD's) cannot multiply two matrices of codes of that type."""
    if target == FP8 and (capability is None or capability < (8, 9)):
        return "e4m3, which compute capability 8.9 has: activations=int8 runs"
    if target == torch.int8 and capability is not None and capability < (8, 0):
        return "int8 in Triton, which compute capability 8.0 has: weights alone (activations left out) run"
    return None


def packs_pairs(device: torch.device) -> bool:
    """Whether an NVIDIA GPU, the one that is there if there is one, has instructions on pairs of bfloat16."""
    there = device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None
    return not there or torch.cuda.get_device_capability(device) >= PAIRS


def target_of(anchor: Anchor) -> torch.dtype:
    """The type that is multiplied: that of activations' codes, or of h."""
    return anchor.dtype if anchor.activation is None else anchor.activation.dtype


def _pointer(dtype: torch.dtype) -> str:
    return "*u8" if dtype.itemsize == 1 and dtype.is_floating_point else pointer_type(dtype)


def _nodes(anchor: Anchor) -> list[Node]:
    """The tensors that kernels read, x first."""
    return [anchor.x, *operands(anchor)]


def _kernel(
    product: Product,
    name: str,
    body: str,
    served: About,
    header: str,
    block_n: int | None = None,
    normed: bool = False,
) -> Kernel:
    """A kernel with the arguments that its body mentions. normed: x is what the norm's kernel has left."""
    anchor, tile = product.anchor, product.tile
    pointers: dict[str, tuple[str, str, str, tuple[int | str, ...] | None]] = {
        f"{anchor.names[n]}_ptr": (_pointer(value(n).dtype), n.name, "read", None) for n in _nodes(anchor)
    }
    access, shape = "write" if block_n is None else "read", (tile.split, product.total, "rows_in_parts")
    pointers["parts_ptr"] = ("*fp32", "parts", access, shape)
    if normed:
        pointers["x_ptr"] = (_pointer(anchor.dtype), "normed", "read", ("m", anchor.k))
    pointers |= {f"{anchor.names[n]}_out": (_pointer(value(n).dtype), n.name, "write", None) for n in outputs(anchor)}
    used = {p: kind for p, kind in pointers.items() if re.search(rf"\b{p}\b", body)}
    constants: dict[str, int | float | bool] = {"BLOCK_M": tile.block_m, "BLOCK_N": block_n or tile.block_n}
    if product.few:
        constants["ROWS"] = tile.block_m
    if re.search(r"\bPACKED\b", body):
        constants["PACKED"] = False
    first = call(f"def {name}(", [*used, "M", *(f"{c}: tl.constexpr" for c in constants)], "):")
    return Kernel(
        name,
        header + "\n".join([DECORATOR, *first, body]),
        {p: kind for p, (kind, *_) in used.items()} | {"M": "i32"} | dict.fromkeys(constants, "constexpr"),
        constants,
        *served,
        4 if block_n else tile.num_warps,
        1 if block_n else tile.stages,
        tuple(BufferUse(p, node, access, shape) for p, (_, node, access, shape) in used.items()),
    )


def _norm(anchor: Anchor, name: str) -> Kernel:
    """The kernel that normalises x; regions with other products share it."""
    norm = anchor.norm
    assert norm is not None
    read = [anchor.x, *(n for n in (norm.weight, norm.bias) if n is not None)]
    uses = [BufferUse(f"{anchor.names[n]}_ptr", n.name, "read") for n in read]
    uses.append(BufferUse("normed_ptr", "normed", "write", ("m", anchor.k)))
    kinds = [*(_pointer(value(n).dtype) for n in read), _pointer(anchor.dtype)]
    signature = {use.argument: kind for use, kind in zip(uses, kinds, strict=True)} | {"M": "i32"}
    source = norm_kernel(anchor, name, [use.argument for use in uses])
    warps = 8 if width(anchor) > 2048 else 4
    return Kernel(name, source, signature, {}, *about([norm.node]), warps, 1, tuple(uses))


def _host(
    anchor: Anchor, name: str, tiles: CodedTiling, kernels: tuple[Kernel, ...], few: Product, before: list[Kernel]
) -> tuple[str, tuple[Out, ...]]:
    text = Text()
    given = [anchor.names[n] for n in anchor.placeholders]
    names = Names([*given, "torch", "triton", name, *(k.name for k in kernels)])
    rows, m, block_m, held = (names.new(w) for w in ("rows", "m", "block_m", "rows_in_parts"))
    parts, normed = (names.new(w) for w in ("parts", "normed"))
    out = {n: names.new(f"{anchor.names[n]}_out") for n in outputs(anchor)}
    widths = {n: section.n for section in anchor.sections for n in section.outputs}
    known = {f"{anchor.names[n]}_ptr": f"{_bytes(n, anchor.names[n])}.contiguous()" for n in operands(anchor)}
    known |= {"x_ptr": rows, "parts_ptr": parts, "normed_ptr": normed, "M": m, "BLOCK_M": block_m, "ROWS": held}
    known["PACKED"] = is_nvidia("x") if packs_pairs(value(anchor.x).device) else "False"
    known |= {f"{anchor.names[n]}_out": x for n, x in out.items()}
    shape, device = "(*x.shape[:-1], {})", "device=x.device"

    def launch(kernel: Kernel, columns: int, splits: int = 1) -> None:
        blocks = _blocks(few.apart.anchor if splits > 1 else anchor, columns)
        grid = f"triton.cdiv({m}, {block_m}) * {blocks}"
        values = [f"{p}={known[p]}" if p in kernel.constants else known[p] for p in kernel.signature if p != "BLOCK_N"]
        values += [f"BLOCK_N={kernel.constants['BLOCK_N']}"]
        values += [f"num_warps={kernel.num_warps}", f"num_stages={kernel.num_stages}"]
        text.add(*call(f"{kernel.name}[({grid}, {splits})](", values, ")"))

    text.add(*call(f"def {name}(", [*given, *(f"{x}=None" for x in out.values())], "):"))
    with text.indented():
        text.add(f"{rows} = {_bytes(anchor.x, 'x')}.reshape(-1, {anchor.k}).contiguous()", f"{m} = {rows}.shape[0]")
        for n, width in widths.items():
            with text.block(f"if {out[n]} is None:"):
                text.add(f"{out[n]} = torch.empty({shape.format(width)}, dtype={value(n).dtype}, {device})")
        if before:
            text.add(f"{normed} = torch.empty(({m}, {anchor.k}), dtype={anchor.dtype}, {device})")
        with text.block("with torch.cuda.device_of(x):"):
            for kernel in before:
                values = [*(known[p] for p in kernel.signature), f"num_warps={kernel.num_warps}", "num_stages=1"]
                text.add(*call(f"{kernel.name}[({m},)](", values, ")"))
                known["x_ptr"] = normed
            with text.block(f"if {m} <= {tiles.few_rows}:"):
                text.add(f"{held} = 1 << ({m} - 1).bit_length()", f"{block_m} = {_least(tiles.few, held)}")
                split = tiles.few.split
                if split > 1:
                    text.add(f"{parts} = torch.empty(({split}, {few.total}, {held}), dtype=torch.float32, {device})")
                launch(kernels[0], tiles.few.block_n, split)
                if split > 1:
                    launch(kernels[1], SUM_BLOCK)
            if tiles.some is not None:
                with text.block(f"elif {m} <= {tiles.some_rows}:"):
                    text.add(f"{block_m} = {tiles.some.block_m}")
                    launch(kernels[-2], tiles.some.block_n)
            with text.block("else:"):
                text.add(f"{block_m} = {tiles.many.block_m}")
                launch(kernels[-1], tiles.many.block_n)
        results = [out[n] for n in anchor.outputs]
        ending = f"({', '.join(results)}{',' if len(results) == 1 else ''})" if anchor.returns_tuple else results[0]
        text.add(f"return {ending}")
    lead = tuple(size(s) for s in value(anchor.x).shape[:-1])
    return str(text), tuple(
        Out(out[n], anchor.outputs.index(n), (*lead, width), None, value(n).dtype) for n, width in widths.items()
    )


def _least(tile: Tile, m: str) -> str:
    """The least block of rows that holds all of them, up to FEW_ROWS; not below the tile's own."""
    steps = [b for b in (8, 16, 32) if b >= tile.block_m]
    return " else ".join([*(f"{b} if {m} <= {b}" for b in steps), "64" if tile.block_m < 64 else str(tile.block_m)])


def _blocks(anchor: Anchor, block_n: int) -> int:
    """Programs along the columns of all sections."""
    return sum(-(-section.n // block_n) for section in anchor.sections)


def _bytes(node: Node, text: str) -> str:
    """A tensor as kernels take it: 8-bit floating-point numbers as their bytes."""
    dtype = value(node).dtype
    return f"{text}.view(torch.uint8)" if dtype.itemsize == 1 and dtype.is_floating_point else text
