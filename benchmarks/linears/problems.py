"""The linears of the sweep: shapes and formats with what stands around them, and the tiles to try."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fuseline.codegen.kernel import Kernel, Launcher
from fuseline.codegen.templates.config import RowConfig, TileConfig, Tiling
from fuseline.compiler.ops import dequantize, glu, rms_norm


@dataclass(frozen=True)
class Shape:
    """k inputs, linears of `widths` columns, one scale for `group` inputs at four bits; what stands around them."""

    k: int
    widths: tuple[int, ...]
    group: int
    around: str  # "norm": RMSNorm before; "glu": that and a gated unit after; "residual": a residual added


SHAPES = {
    "smollm2.qkv": Shape(576, (576, 192, 192), 64, "norm"),
    "smollm2.gate_up": Shape(576, (1536, 1536), 64, "glu"),
    "smollm2.down": Shape(1536, (576,), 64, "residual"),
    "llama3-8b.qkv": Shape(4096, (4096, 1024, 1024), 128, "norm"),
    "llama3-8b.gate_up": Shape(4096, (14336, 14336), 128, "glu"),
    "llama3-8b.down": Shape(14336, (4096,), 128, "residual"),
}
FORMATS = {"bf16": 0, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Problem:
    """One shape in one format for a number of rows, in bfloat16."""

    name: str
    format: str
    rows: int

    @property
    def shape(self) -> Shape:
        return SHAPES[self.name]

    def region(self, x: torch.Tensor, side: torch.Tensor, *weights: torch.Tensor) -> Any:
        """side: the norm's weight or the residual."""
        shape, bits = self.shape, FORMATS[self.format]
        h = x if shape.around == "residual" else rms_norm(x, side, 1e-5, False, torch.float32)
        if bits:
            group = shape.group if bits == 4 else shape.k
            pairs = zip(weights[::2], weights[1::2], strict=True)
            weights = tuple(dequantize(codes, scale, None, bits, group, x.dtype) for codes, scale in pairs)
        results = [F.linear(h, w) for w in weights]
        if shape.around == "glu":
            return glu(results[0], results[1], "silu")
        return side + results[0] if shape.around == "residual" else tuple(results)

    def activations(self, device: str) -> list[torch.Tensor]:
        side = (self.rows, sum(self.shape.widths)) if self.shape.around == "residual" else (self.shape.k,)
        sizes = ((self.rows, self.shape.k), side)
        return [torch.randn(size, device=device, dtype=torch.bfloat16) for size in sizes]

    def weights(self, device: str) -> list[torch.Tensor]:
        shape, bits, found = self.shape, FORMATS[self.format], []
        for n in shape.widths:
            if not bits:
                found.append(torch.randn(n, shape.k, device=device, dtype=torch.bfloat16) * shape.k**-0.5)
                continue
            found += random_codes(n, shape.k, bits, shape, device)
        return found

    def graph(self) -> torch.fx.GraphModule:
        with FakeTensorMode():
            inputs = (*self.activations("cpu"), *self.weights("cpu"))
            return make_fx(self.region, tracing_mode="real", pre_dispatch=True)(*inputs)


def random_codes(rows: int, columns: int, bits: int, shape: Shape, device: str) -> list[torch.Tensor]:
    """Codes and scales of a weight of this shape's size, stored as [rows, columns]: int8 with one scale a row, or int4
    in the shape's groups."""
    low, high, dtype = (0, 256, torch.uint8) if bits == 4 else (-127, 128, torch.int8)
    stored, groups = (columns // 2, columns // shape.group) if bits == 4 else (columns, 1)
    codes = torch.randint(low, high, (rows, stored), device=device, dtype=dtype)
    scale = torch.rand(rows, groups, device=device) + 0.5
    return [codes, (scale * shape.k**-0.5 / 2 ** (bits - 2)).bfloat16()]


def candidates(problem: Problem, default: Tiling) -> Iterator[Tiling]:
    """The default first, then tiles that leave a thread between 8 and 128 stored elements of a weight."""
    yield default
    linears = 2 if problem.shape.around == "glu" else 1
    if problem.rows <= default.row_max:
        stored = problem.shape.k // (2 if problem.format == "int4" else 1)
        for elements in (256, 512, 1024, 2048, 4096):
            for block_n in (1, 2, 4, 8):
                for warps in (1, 2, 4, 8):
                    share = block_n * linears * elements / (32 * warps)
                    if elements < 2 * stored and 8 <= share <= 128 and elements >= 128 * warps:
                        yield replace(default, row=RowConfig(block_n, elements, warps))
        for stages in (2, 3):
            yield replace(default, row=replace(default.row, stages=stages))
        return
    for block_m in (16, 32, 64, 128):
        for block_n in (32, 64, 128):
            for warps, stages in ((4, 3), (4, 4), (8, 3)):
                if block_m * block_n * linears <= 128 * 128:
                    tile = TileConfig(block_m, block_n, default.tile.block_k, 8, warps, stages)
                    yield replace(default, tile=tile)


def chosen(launcher: Launcher, tiles: Tiling, rows: int) -> Kernel:
    return launcher.kernels[0 if rows <= tiles.row_max else 1]
