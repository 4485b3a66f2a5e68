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
    text.add(DECORATOR, *signature_line(name, arguments(anchor), CONSTANTS))
    with text.indented():
        text.add(
            f"pids_in_group = GROUP_M * {blocks if len(anchor.sections) == 1 else f'({blocks})'}",
            "pid = tl.program_id(0)",
            "first_m = pid // pids_in_group * GROUP_M",
            "height = min(tl.cdiv(M, BLOCK_M) - first_m, GROUP_M)",
            "m = (first_m + pid % pids_in_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)",
            "block = pid % pids_in_group // height",
            *(MAGIC_VARIABLE if any(linear.plain.bits for linear in anchor.linears) else ()),
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
    text.add(f"{n} = {first} * BLOCK_N + tl.arange(0, BLOCK_N)")
    inside = f"inside_n{tag}" if section.n % config.block_n else None
    if inside:
        text.add(f"{inside} = {n} < {section.n}")
    results = {}
    for number, linears in enumerate(by_format(section)):
        Product(anchor, linears, f"{tag}_{number}" if number else tag, n, inside, config).write(text)
        for linear in linears:
            weight = linear.plain
            results[linear] = f"acc_{anchor.names[linear.node]}"
            if weight.bits and weight.groups == 1:
                scale = load(f"{anchor.names[weight.scale]}_ptr + {n}", (inside,))
                results[linear] += f" * {scale}.to(tl.float32)[None, :]"
    Epilogue(anchor, section, columns=n, inside=inside, rows="m", tile=True, tag=tag).write(text, results)


class Product:
    """The loop over stored elements that linears of one weight format share; it fills `acc_<linear>`.

    n, inside: the kernel's column index and its mask, or None where every column exists. Where BLOCK_K divides a run
    of inputs with one scale, a tile's group is a number and its scales are a row; otherwise the group is a column of
    BLOCK_K and every weight of the tile looks up its own.
    """

    def __init__(
        self, anchor: Anchor, linears: list[Linear], tag: str, n: str, inside: str | None, config: TileConfig
    ) -> None:
        self.anchor, self.linears, self.tag, self.n = anchor, linears, tag, n
        self.inside, self.inside_row = inside, inside and f"{inside}[None, :]"
        self.weight = weight = linears[0].plain
        self.grouped = weight.bits > 0 and weight.groups > 1
        self.whole = weight.run % config.block_k == 0
        self.live = f"live{tag}" if weight.stored % config.block_k else None

    def write(self, text: Text) -> None:
        tag, weight, names = self.tag, self.weight, self.anchor.names
        for linear in self.linears:
            name = names[linear.node]
            text.add(f"acc_{name} = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)")
            if linear.plain.zero is not None and not self.grouped:
                zero = load(f"{names[linear.plain.zero]}_ptr + {self.n}", (self.inside,), "0")
                text.add(f"zero_{name} = {zero}.to(tl.float32)[None, :]")
        with text.block(f"for j0{tag} in range(0, {weight.stored}, BLOCK_K):"):
            text.add(f"j{tag} = j0{tag} + tl.arange(0, BLOCK_K)")
            if self.live:
                text.add(f"{self.live} = j{tag} < {weight.stored}")
            k = f"j{tag}"
            if self.grouped:
                text.add(f"group{tag} = {f'j0{tag}' if self.whole else k} // {weight.run}")
            if self.grouped and weight.bits == 4:
                k = f"k{tag}"
                text.add(f"{k} = j{tag} + group{tag} * {weight.run}")
            for half in range(weight.halves):
                self._activation(text, half, f"({k} + {weight.run})[None, :]" if half else f"{k}[None, :]")
            for linear in self.linears:
                self._accumulate(text, linear)

    def _activation(self, text: Text, half: int, k: str) -> None:
        """Loads a tile of x for one half of the bytes, normalises it, and rounds it to the product's dtype."""
        name, dtype = f"h{self.tag}_{half}", triton_type(self.anchor.dtype)
        live = self.live and f"{self.live}[None, :]"
        loaded = load(f"x_rows + {k}", ("inside_m", live))
        if self.anchor.norm is None:
            text.add(f"{name} = {loaded}.to({dtype})")
        else:
            text.add(f"{name} = {loaded}.to(tl.float32)")
            text.add(f"{name} = ({normalised(self.anchor, name, k, live)}).to({dtype})")

    def _accumulate(self, text: Text, linear: Linear) -> None:
        weight, name, tag = linear.plain, self.anchor.names[linear.node], self.tag
        dtype = triton_type(self.anchor.dtype)
        precision = ', input_precision="ieee"' if self.anchor.dtype is torch.float32 else ""
        masks: tuple[str | None, ...] = (self.live and f"{self.live}[:, None]", self.inside_row)
        pointer = f"{self.anchor.names[weight.tensor]}_ptr + {column_offset(self.n, linear)}[None, :] + j{tag}[:, None]"
        if not weight.bits:
            text.add(f"w_{name} = {load(pointer, masks)}.to({dtype})")
            text.add(f"acc_{name} = tl.dot(h{tag}_0, w_{name}, acc_{name}{precision})")
            return
        text.add(f"codes_{name} = {load(pointer, masks, '0')}")
        text.add(f"codes_{name} = {weight.integer(f'codes_{name}')}")
        if self.grouped:
            at = f"({self.n} * {weight.groups})[None, :] + group{tag}{'' if self.whole else '[:, None]'}"
            masks = masks[1:] if self.whole else masks
            scale = load(f"{self.anchor.names[weight.scale]}_ptr + {at}", masks)
            text.add(f"scale_{name} = {scale}.to(tl.float32)")
            if weight.zero is not None:
                zero = load(f"{self.anchor.names[weight.zero]}_ptr + {at}", masks, "0")
                text.add(f"zero_{name} = {zero}.to(tl.float32)")
        for half in range(weight.halves):
            factors = (["0.0625"] if half else []) + ([f"scale_{name}"] if self.grouped else [])
            w = " * ".join([f"q{half}_{name}", *factors])
            text.add(f"q{half}_{name} = {weight.decode(f'codes_{name}', half, f'zero_{name}')}")
            text.add(f"w_{name} = {f'({w})' if factors else w}.to({dtype})")
            text.add(f"acc_{name} = tl.dot(h{tag}_{half}, w_{name}, acc_{name}{precision})")
