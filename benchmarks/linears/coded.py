"""Linears with coded weights: Llama-3-8B's shapes, kinds of kernels, and the tiles to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseline.codegen.emitter import emit_region
from fuseline.codegen.kernel import Kernel, Launcher, Refusal
from fuseline.codegen.module_file import load_module, write_module
from fuseline.codegen.templates.anchor import analyse
from fuseline.codegen.templates.coded.config import CodedTiling, tiling
from fuseline.codegen.templates.coded.host import target_of
from fuseline.codegen.templates.coded.weight import Coded
from fuseline.codegen.templates.linear import emit_linear
from fuseline.compiler.formats.words import Words, as_bits
from fuseline.compiler.ops import decode, decode_words, encode, quantize
from fuseline.compiler.schemes import Scheme

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""name → (output columns, inputs)."""
KINDS = {
    "w4a16": ("int4:g128", ""), "w8a16": ("int8", ""), "w8a8": ("int8", "int8"), "fp8": ("fp8", "e4m3"),
    "w4a8": ("int4:g128:sym", "int8"), "w2a16": ("int2:g128", ""), "ternary": ("ternary", ""),
    "w4a16-sym": ("int4:g128:sym", ""), "w3a16": ("int3:g128", ""), "binary": ("binary", ""),
    "mxfp4": ("mxfp4", ""), "nvfp4": ("nvfp4", ""), "w8fp": ("fp8", ""),
}  # fmt: skip
"""name → (the weight's scheme, codes of the activations)."""
DEFAULT = ("w4a16", "w8a16", "w8a8", "fp8", "w4a8", "w2a16", "ternary")


@dataclass(frozen=True)
class Problem:
    """One shape and kind of kernel, in bfloat16."""

    shape: str
    kind: str

    @property
    def n(self) -> int:
        return SHAPES[self.shape][0]

    @property
    def k(self) -> int:
        return SHAPES[self.shape][1]

    @property
    def scheme(self) -> Scheme:
        return Scheme.parse(KINDS[self.kind][0], weights=True)

    @property
    def activations(self) -> str:
        return KINDS[self.kind][1]

    @property
    def run(self) -> int:
        words = Words.fitting(self.scheme.bits, self.k, self.scheme.group_of(self.k))
        assert words is not None
        return 0 if self.activations and self.scheme.bits == 8 else words.run

    def weight(self, device: str | torch.device) -> list[torch.Tensor]:
        """Random codes, scales, zero points and the tensor's scale, as the kernel reads them."""
        scheme, n, k = self.scheme, self.n, self.k
        groups, bits = k // scheme.group_of(k), scheme.bits
        stored = scheme.element.stored
        if not self.run and stored.is_floating_point:
            codes = torch.randn(n, k, device=device).to(stored)
        elif not self.run:
            codes = torch.randint(-127, 128, (n, k), device=device, dtype=torch.int8)
        elif stored.is_floating_point:  # not every code is a number
            codes = Words(bits, self.run).pack(as_bits(torch.randn(n, k, device=device).to(stored)))
        else:
            shape = Words(bits, self.run).shape(n, k)
            codes = torch.randint(-(2**31), 2**31, shape, device=device, dtype=torch.int64).to(torch.int32)
        spread = {"ternary": 1.0, "binary": 1.0}.get(scheme.format, 2.0 ** (bits - 2) if scheme.of.affine else 4.0)
        scale = (torch.rand(groups, n, device=device) + 0.5) * k**-0.5 / spread
        outer = []
        if scheme.of.scaling == "e8m0":
            made = torch.randint(115, 122, (groups, n), device=device, dtype=torch.uint8)
        elif scheme.of.scaling == "e4m3":
            made, outer = (scale * 2**7).to(torch.float8_e4m3fn), [torch.full((1,), 2.0**-7, device=device)]
        else:
            made = scale.bfloat16()
        zero = [torch.randint(0, 2**bits, (groups, n), device=device, dtype=torch.uint8)] * (not scheme.symmetric)
        return [codes, made, *zero, *outer]

    def x(self, m: int, device: str | torch.device) -> torch.Tensor:
        return torch.randn(m, self.k, device=device, dtype=torch.bfloat16)

    def coded(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What the product reads: x, or its codes and scales."""
        if self.activations == "int8":
            return list(quantize(x, 8, self.k))
        return list(encode(x, self.activations, self.k)) if self.activations else [x]

    def product(self, x: torch.Tensor, *tensors: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        rest, scheme = list(tensors), self.scheme
        if self.activations:
            x = decode(x, rest.pop(0), None, None, self.activations, self.k, False, dtype)
        codes, scale = rest.pop(0), rest.pop(0)
        zero = None if scheme.symmetric else rest.pop(0)
        outer = rest.pop(0) if rest else None
        group = scheme.group_of(self.k)
        return F.linear(x, decode_words(codes, scale, zero, outer, scheme.format, group, self.run, dtype))

    def exact(self, inputs: list[torch.Tensor], weight: list[torch.Tensor]) -> torch.Tensor:
        """What the codes mean, in float64."""
        kept = (torch.float8_e4m3fn, torch.float8_e5m2)
        wide = lambda t: t.double() if t.is_floating_point() and t.dtype not in kept else t
        return self.product(*map(wide, inputs), *map(wide, weight), dtype=torch.float64)

    def graph(self) -> GraphModule:
        return _graph(self)

    def quantizing(self) -> GraphModule:
        """The graph that makes the activations' codes, of any number of rows."""
        mode, kinds = FakeTensorMode(shape_env=ShapeEnv()), [DimDynamic.DUCK, DimDynamic.STATIC]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)  # type: ignore[arg-type]
        x = mode.from_tensor(self.x(4, "cpu"), source=ConstantSource("x"), symbolic_context=context)
        with mode:
            return make_fx(lambda x: tuple(self.coded(x)), tracing_mode="real", pre_dispatch=True)(x)

    def least_bytes(self, m: int) -> int:
        """Bytes that the product cannot avoid: of the weight, of x or its codes, of the result."""
        scheme, k = self.scheme, self.k
        per_row = scheme.element.packed_bytes(k) if scheme.format != "ternary" else k // 4  # as it is laid out
        groups = k // scheme.group_of(k)
        scales = groups * ((2 if scheme.of.scaling == "real" else 1) + (0 if scheme.symmetric else 1))
        return self.n * (per_row + scales) + m * (k * (1 if self.activations else 2) + 2 * self.n)


@cache
def _graph(problem: Problem) -> GraphModule:
    inputs = lambda: [*problem.coded(problem.x(4, "cpu")), *problem.weight("cpu")]
    return _traced(lambda *t: problem.product(*t), inputs)


def _traced(function: Callable[..., Any], inputs: Callable[[], list[torch.Tensor]]) -> GraphModule:
    with FakeTensorMode(shape_env=ShapeEnv()):
        return make_fx(function, tracing_mode="real", pre_dispatch=True)(*inputs())


def candidates(problem: Problem, m: int, sweep: bool) -> Iterator[CodedTiling]:
    """The template's own tiles first, then others for so many rows."""
    anchor = analyse(problem.graph())
    assert not isinstance(anchor, Refusal), anchor
    default = tiling(anchor, target_of(anchor))
    yield default
    weight = anchor.linears[0].weight
    assert isinstance(weight, Coded)
    if not sweep:
        return
    if m <= default.few_rows:
        for block_n in (64, 128):
            tiles = -(-problem.n // block_n)
            for split in (s for s in range(1, 33) if weight.chunks % s == 0 and 100 <= s * tiles <= 1100):
                for stages in (3, 5):
                    few = replace(default.few, block_n=block_n, split=split, stages=stages)
                    yield replace(default, few=few)
        return
    for block_m, block_n, warps, stages in (
        (64, 128, 4, 3), (64, 128, 8, 3), (128, 64, 4, 3), (128, 128, 8, 4), (128, 256, 8, 3), (256, 64, 8, 3),
        (256, 128, 8, 2), (256, 128, 8, 3),
    ):  # fmt: skip
        tile = replace(default.many, block_m=block_m, block_n=block_n, num_warps=warps, stages=stages)
        yield replace(default, many=tile, some=None)


@dataclass(frozen=True)
class Candidate:
    """Tiles, the module that holds their kernels, and those that a number of rows launches."""

    tiles: CodedTiling
    path: Path
    kernels: tuple[Kernel, ...]

    @property
    def call(self) -> Callable[..., torch.Tensor]:
        return load_module(self.path).bench  # type: ignore[no-any-return]


def size_of(tiles: CodedTiling, m: int) -> str:
    """The name of the tile that takes m rows."""
    if m <= tiles.few_rows:
        return "few"
    return "some" if tiles.some is not None and m <= tiles.some_rows else "many"


def emitted(problem: Problem, m: int, sweep: bool, folder: Path) -> list[Candidate]:
    graph, found = problem.graph(), []
    for number, tiles in enumerate(dict.fromkeys(candidates(problem, m, sweep))):
        launcher = emit_linear(graph, "bench", tiles)
        assert isinstance(launcher, Launcher), launcher
        path = folder / f"{problem.shape}-{problem.kind}-{m}-{number}.py"
        write_module(path, [launcher])
        ending = f"_{size_of(tiles, m)}"
        kernels = [k for k in launcher.kernels if k.name.endswith(("_few", "_sum") if ending == "_few" else ending)]
        found.append(Candidate(tiles, path, tuple(kernels)))
    return found


def quantizer(problem: Problem, folder: Path) -> Callable[..., tuple[torch.Tensor, ...]] | None:
    """The kernel that makes the activations' codes; None for values that are not coded."""
    if not problem.activations:
        return None
    launcher = emit_region(problem.quantizing(), "quantizing")
    if isinstance(launcher, Refusal):
        return lambda x: tuple(problem.coded(x))
    path = folder / f"quantize-{problem.activations}-{problem.k}.py"
    write_module(path, [launcher])
    return load_module(path).quantizing  # type: ignore[no-any-return]
