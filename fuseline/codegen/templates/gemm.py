"""The many-row kernel: tiles of BLOCK_M rows by BLOCK_N columns of one section, on tensor cores.

Sums are float32. h is rounded to the product's dtype, and so is a dequantized weight, as in the graph; weights with
one scale a column are multiplied as integers, exactly, and scaled at the end. float32 products are IEEE, not TF32.
Tiles are walked in groups of GROUP_M rows so that weights and rows are found in L2.
"""

from __future__ import annotations

import torch

from ..dtypes import triton_type
from .anchor import Anchor, Linear, Section
from .config import TileConfig
from .epilogue import Epilogue
from .norms import normalised, statistics
from .signature import DECORATOR, arguments, branches, by_format, column_offset, signature_line
from .text import Text, load
from .weights import MAGIC_VARIABLE

CONSTANTS = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")


def tile_kernel(anchor: Anchor, name: str, config: TileConfig) -> str:
    """The kernel's source; grid: ceil(rows / BLOCK_M) times the sum of ceil(n / BLOCK_N) over the sections."""
    text = Text()
    blocks = " + ".join(f"tl.cdiv({section.n}, BLOCK_N)" for section in anchor.sections)
    text.add(DECORATOR)
    with text.block(signature_line(name, arguments(anchor), CONSTANTS)):
        text.add(
            f"pids_in_group = GROUP_M * ({blocks})",
            "pid = tl.program_id(0)",
            "first_m = pid // pids_in_group * GROUP_M",
            "height = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)",
            "m = (first_m + pid % pids_in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)",
            "block = pid % pids_in_group // height",
            *(MAGIC_VARIABLE if any(linear.weight.bits for linear in anchor.linears) else ()),
            "inside_m = (m < M)[:, None]",
            f"x_rows = x_ptr + m.to(tl.int64)[:, None] * {anchor.k}",
        )
        if anchor.norm is not None:
            statistics(text, anchor, tile=True)
        for section, tag, head, first in branches(anchor):
            with text.block(head):
                _section(text, anchor, section, tag, first, config)
    return str(text)


def _section(text: Text, anchor: Anchor, section: Section, tag: str, first: str, config: TileConfig) -> None:
    n = f"n{tag}"
    text.add(f"{n} = ({first}) * BLOCK_N + tl.arange(0, BLOCK_N)")
    inside = f"inside_n{tag}" if section.n % config.block_n else None
    if inside:
        text.add(f"{inside} = {n} < {section.n}")
    results = {}
    for number, linears in enumerate(by_format(section)):
        _product(text, anchor, linears, f"{tag}_{number}" if number else tag, n, inside, config)
        for linear in linears:
            weight = linear.weight
            results[linear] = f"acc_{linear.node.name}"
            if weight.bits and weight.groups == 1:
                scale = load(f"{weight.scale.name}_ptr + {n}", (inside,))
                results[linear] += f" * {scale}.to(tl.float32)[None, :]"
    Epilogue(anchor, section, columns=n, inside=inside, rows="m", tile=True, tag=tag).write(text, results)


def _product(
    text: Text, anchor: Anchor, linears: list[Linear], tag: str, n: str, inside: str | None, config: TileConfig
) -> None:
    """The loop over stored elements, shared by linears of one weight format; fills `acc_<linear>`."""
    weight = linears[0].weight
    grouped = weight.bits and weight.groups > 1
    whole = grouped and weight.run % config.block_k == 0  # a tile lies in one group: its number is a scalar
    ragged = weight.stored % config.block_k != 0
    j, live, group = f"j{tag}", f"live{tag}" if ragged else None, f"group{tag}"
    for linear in linears:
        text.add(f"acc_{linear.node.name} = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)")
        if linear.weight.zero is not None and not grouped:
            zero = load(f"{linear.weight.zero.name}_ptr + {n}", (inside,), "0")
            text.add(f"zero_{linear.node.name} = {zero}.to(tl.float32)[None, :]")
    with text.block(f"for j0{tag} in range(0, {weight.stored}, BLOCK_K):"):
        text.add(f"{j} = j0{tag} + tl.arange(0, BLOCK_K)")
        if live:
            text.add(f"{live} = {j} < {weight.stored}")
        if grouped:
            text.add(f"{group} = j0{tag} // {weight.run}" if whole else f"{group} = ({j} // {weight.run})[:, None]")
        k = j
        if weight.bits == 4 and grouped:
            k = f"k{tag}"
            text.add(f"{k} = {j} + {group} * {weight.run}" if whole else f"{k} = {j} + {j} // {weight.run} * {weight.run}")
        for half in range(weight.halves):
            _activation(text, anchor, f"h{tag}_{half}", k + (f" + {weight.run}" if half else ""), live)
        for linear in linears:
            _accumulate(text, anchor, linear, tag, n, inside, live, grouped, group, whole)


def _activation(text: Text, anchor: Anchor, name: str, k: str, live: str | None) -> None:
    """Loads a tile of x, normalises it, and rounds it to the product's dtype."""
    column = f"({k})[None, :]" if " " in k else f"{k}[None, :]"
    live = live and f"{live}[None, :]"
    text.add(f"{name} = {load(f'x_rows + {column}', ('inside_m', live))}")
    if anchor.norm is not None:
        text.add(f"{name} = {name}.to(tl.float32)", f"{name} = {normalised(anchor.norm, name, column, live)}")
    text.add(f"{name} = {name}.to({triton_type(anchor.dtype)})")


def _accumulate(
    text: Text, anchor: Anchor, linear: Linear, tag: str, n: str, inside: str | None, live: str | None,
    grouped: bool, group: str, whole: bool,
) -> None:  # fmt: skip
    weight, name, dtype = linear.weight, linear.node.name, triton_type(anchor.dtype)
    inside = inside and f"{inside}[None, :]"
    live = live and f"{live}[:, None]"
    precision = ', input_precision="ieee"' if anchor.dtype is torch.float32 else ""
    pointer = f"{weight.tensor.name}_ptr + {column_offset(n, linear)}[None, :] + j{tag}[:, None]"
    if not weight.bits:
        text.add(f"w_{name} = {load(pointer, (live, inside))}.to({dtype})")
        text.add(f"acc_{name} = tl.dot(h{tag}_0, w_{name}, acc_{name}{precision})")
        return
    text.add(f"codes_{name} = {load(pointer, (live, inside), '0')}")
    text.add(f"codes_{name} = {weight.integer(f'codes_{name}')}")
    zero = f"zero_{name}" if weight.zero is not None else None
    if grouped:
        at = f"({n} * {weight.groups})[None, :] + {group}"
        masks = (inside,) if whole else (live, inside)
        text.add(f"scale_{name} = {load(f'{weight.scale.name}_ptr + {at}', masks)}.to(tl.float32)")
        if weight.zero is not None:
            text.add(f"{zero} = {load(f'{weight.zero.name}_ptr + {at}', masks, '0')}.to(tl.float32)")
    for half in range(weight.halves):
        w = f"({weight.decode(f'codes_{name}', half, weight.centre(half, zero))})"
        factors = (["0.0625"] if half else []) + ([f"scale_{name}"] if grouped else [])
        text.add(f"w_{name} = ({' * '.join([w, *factors])}).to({dtype})")
        text.add(f"acc_{name} = tl.dot(h{tag}_{half}, w_{name}, acc_{name}{precision})")
