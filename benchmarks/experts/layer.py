"""Layers of routed experts: sizes, random weights, routings, and the kernels of the template with the tiles to try."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fuseline.codegen.kernel import Launcher, Refusal
from fuseline.codegen.module_file import load_module, write_module
from fuseline.codegen.templates.experts.config import RowConfig, Stage, TileConfig, Tiling, tiling
from fuseline.codegen.templates.experts.read import Experts, read
from fuseline.codegen.templates.moe import emit_moe
from fuseline.compiler.formats.pairs import pack_pair
from fuseline.compiler.formats.words import COLUMNS, Words, as_bits
from fuseline.compiler.ops import decode_words, moe, moe_pairs
from fuseline.compiler.schemes import Scheme

SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2), "qwen3-30b-a3b": (2048, 768, 128, 8), "olmoe": (2048, 1024, 64, 8),
    "tiny": (128, 128, 8, 2),
}  # fmt: skip
"""name → (hidden size, middle of an expert, experts, experts a token); tiny is for trying the script."""
CODES = {"int4": "int4:g128", "int8": "int8", "fp8": "fp8"}
"""kind → the scheme of its codes."""
KINDS = ("bf16", "pairs", *CODES)


@dataclass(frozen=True)
class Layer:
    """One layer in bfloat16; kind "pairs": all experts packed in pairs, "bf16": as they are, others: as codes."""

    shape: str
    kind: str

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return SHAPES[self.shape]

    @property
    def expert_bytes(self) -> int:
        """Of one expert's matrices, or of one pair's; of codes with their scales and zero points."""
        hidden, inner, _, _ = self.sizes
        if self.kind in CODES:
            scales = 3 * hidden * inner // 128 * 3 if self.kind == "int4" else 2 * (2 * inner + hidden)
            return 3 * hidden * inner * self.scheme.bits // 8 + scales
        return 2 * 3 * hidden * inner

    @property
    def scheme(self) -> Scheme:
        return Scheme.parse(CODES[self.kind], weights=True)

    def run(self, k: int) -> int:
        """Of the words of codes, of rows of k."""
        words = Words.fitting(self.scheme.bits, k, self.scheme.group_of(k))
        assert words is not None
        return words.run

    def weights(self, device: str | torch.device) -> list[torch.Tensor]:
        """gate_up and down of all experts, made in place; of pairs the words, and each expert's row and slot."""
        hidden, inner, experts, _ = self.sizes
        found: list[torch.Tensor] = []
        for n, k in ((2 * inner, hidden), (hidden, inner)):
            if self.kind in CODES:
                found += self.codes(experts * n, k, device)
                continue
            count = experts if self.kind == "bf16" else experts // 2
            made = torch.empty(count, n, k, dtype=torch.bfloat16, device=device)
            made.normal_(0, k**-0.5)
            if self.kind == "pairs":
                for one in made:
                    masks, signs = (torch.rand(2, n, k, device=device) < p for p in (0.75, 0.5))
                    one.copy_(pack_pair(one.abs(), masks, signs).view(torch.bfloat16))
                made = made.view(torch.int16)
            found.append(made)
        if self.kind == "pairs":
            expert = torch.arange(experts, dtype=torch.int32, device=device)
            found += [expert // 2, expert % 2]
        return found

    def codes(self, n: int, k: int, device: str | torch.device) -> list[torch.Tensor]:
        """Random codes of a table [n, k] in words, scales and zero points, as the kernels read them."""
        scheme, words = self.scheme, Words(self.scheme.bits, self.run(k))
        groups = k // scheme.group_of(k)
        if self.kind == "fp8":  # not every code is a number
            table = torch.empty(words.shape(n, k), dtype=torch.int32, device=device)
            for part in table.split(64):
                numbers = torch.randn(len(part) * COLUMNS, k, device=device).to(scheme.element.stored)
                part.copy_(words.pack(as_bits(numbers)))
        else:
            table = torch.randint(-(2**31), 2**31, words.shape(n, k), device=device, dtype=torch.int64)
            table = table.to(torch.int32)
        spread = {"int4": 4.0, "int8": 64.0}.get(self.kind, 1.0)
        scale = ((torch.rand(groups, n, device=device) + 0.5) * k**-0.5 / spread).bfloat16()
        zero = [torch.randint(0, 16, (groups, n), device=device, dtype=torch.uint8)] * (not scheme.symmetric)
        return [table, scale, *zero]

    def tokens(self, m: int, device: str | torch.device) -> torch.Tensor:
        return torch.randn(m, self.sizes[0], device=device, dtype=torch.bfloat16)

    def routing(self, m: int, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts of m tokens, each as likely as any other, and their weights."""
        _, _, experts, top = self.sizes
        weights, indices = torch.rand(m, experts, device=device).topk(top)
        return indices, (weights / weights.sum(-1, keepdim=True)).bfloat16()

    def touched(self, indices: torch.Tensor) -> int:
        """Distinct experts, or pairs, that a routing reads."""
        return int((indices // 2 if self.kind == "pairs" else indices).unique().numel())

    def flops(self, m: int) -> int:
        hidden, inner, _, top = self.sizes
        return 2 * m * top * 3 * hidden * inner

    def call(self, *given: torch.Tensor) -> torch.Tensor:
        if self.kind in CODES:
            return moe(*given[:3], *self.expanded(given[3:], given[0].dtype))  # type: ignore[no-any-return]
        return (moe if self.kind == "bf16" else moe_pairs)(*given)  # type: ignore[no-any-return]

    def expanded(self, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Both stacks of matrices, of their codes."""
        hidden, inner, experts, _ = self.sizes
        rest, found, scheme = list(parts), [], self.scheme
        for n, k in ((2 * inner, hidden), (hidden, inner)):
            codes, scale = rest.pop(0), rest.pop(0)
            zero = None if scheme.symmetric else rest.pop(0)
            table = decode_words(codes, scale, zero, None, scheme.format, scheme.group_of(k), self.run(k), dtype)
            found.append(table.view(experts, n, k))
        return found

    def exact(self, given: list[torch.Tensor], count: int) -> torch.Tensor:
        """The first tokens' results in float32."""
        hidden, indices, weights, *rest = given
        if self.kind not in CODES:
            rest = [t.float() if t.is_floating_point() else t for t in rest]
        return self.call(hidden[:count].float(), indices[:count], weights[:count].float(), *rest)

    def graph(self) -> GraphModule:
        return _graph(self)


@cache
def _graph(layer: Layer) -> GraphModule:
    hidden, inner, experts, top = layer.sizes
    count, dtype = (experts // 2, torch.int16) if layer.kind == "pairs" else (experts, torch.bfloat16)
    with FakeTensorMode(shape_env=ShapeEnv()):
        shapes = ((2 * inner, hidden), (hidden, inner))
        if layer.kind in CODES:
            weights = [t for n, k in shapes for t in _fakes(layer, experts * n, k)]
        else:
            weights = [torch.empty(count, n, k, dtype=dtype) for n, k in shapes]
        if layer.kind == "pairs":
            weights += [torch.empty(experts, dtype=torch.int32) for _ in range(2)]
        given = [layer.tokens(4, "cpu"), *layer.routing(4, "cpu"), *weights]
        return make_fx(lambda *t: layer.call(*t), tracing_mode="real", pre_dispatch=True)(*given)


def _fakes(layer: Layer, n: int, k: int) -> list[torch.Tensor]:
    scheme, words = layer.scheme, Words(layer.scheme.bits, layer.run(k))
    groups = k // scheme.group_of(k)
    found = [torch.empty(words.shape(n, k), dtype=torch.int32), torch.empty(groups, n, dtype=torch.bfloat16)]
    return found + [torch.empty(groups, n, dtype=torch.uint8)] * (not scheme.symmetric)


@dataclass(frozen=True)
class Candidate:
    """Tiles, which of the products they are tried for, and the module that holds their kernels."""

    tiles: Tiling
    varied: str
    path: Path

    @property
    def call(self) -> Callable[..., torch.Tensor]:
        return load_module(self.path).bench  # type: ignore[no-any-return]


def regime(layer: Layer, tiles: Tiling, m: int) -> str:
    """Which kernels m tokens are served by: one, few or many."""
    if m == 1:  # codes have tiles then, too
        return "few" if layer.kind in CODES else "one"
    experts = read(layer.graph())
    assert isinstance(experts, Experts)
    return "few" if m <= tiles.means[-1] * experts.keys // experts.top else "many"


def candidates(layer: Layer, m: int, sweep: bool) -> Iterator[tuple[str, Tiling]]:
    """The template's own tiles first; then others of one product at a time, "up" or "down"."""
    experts = read(layer.graph())
    assert not isinstance(experts, Refusal), experts
    default = tiling(experts)
    yield "", default
    if not sweep:
        return
    if m > 1:
        yield from ((f"tiles of {block}", tiles) for block, tiles in _blocks(default, experts, m))
    kind = regime(layer, default, m)
    stage: Stage = getattr(default, kind)
    if kind == "many":
        for up, down in (((64, 64, 3), (128, 64, 3)), ((64, 64, 4), (128, 64, 3)), ((64, 64, 3), (64, 64, 4))):
            wide = (TileConfig(256, n, k, 8, stages) for n, k, stages in (up, down))
            yield "tiles of 256", replace(default, many=Stage(*wide))
    for product in ("up", "down"):
        for config in _others(layer, kind, product, getattr(stage, product)):
            yield product, replace(default, **{kind: replace(stage, **{product: config})})


def _blocks(default: Tiling, experts: Experts, m: int) -> Iterator[tuple[int, Tiling]]:
    """Tiles of 16, 32, 64 and 128 tokens, whatever a group's mean."""
    everything = m * experts.top  # no group has more
    for means, block in (((1,) * 3, 16), ((0, 1, 1), 32), ((0, 0, 1), 64), ((0, 0, 0), 128)):
        yield block, replace(default, means=tuple(everything * x for x in means))


ROWS_OF_PAIRS = {
    "up": ((1, 512, 4), (2, 512, 4), (4, 256, 2), (4, 512, 8)),
    "down": ((1, 256, 4), (1, 512, 4), (2, 256, 4), (2, 512, 4), (4, 128, 4), (4, 128, 8)),
}
TILES_OF_PAIRS = {
    "few up": ((64, 64, 4, 3), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4)),
    "few down": ((64, 64, 4, 4), (64, 64, 4, 8), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)),
    "many up": ((128, 64, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 3)),
    "many down": ((128, 64, 8, 4), (256, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 3)),
}
"""What else is tried for pairs: (block_n, elements, warps) with one token, else (block_n, block_k, warps, stages)."""


def _others(layer: Layer, kind: str, product: str, own: RowConfig | TileConfig) -> Iterator[RowConfig | TileConfig]:
    if layer.kind == "pairs":
        if isinstance(own, RowConfig):
            for block_n, elements, warps in ROWS_OF_PAIRS[product]:
                yield replace(own, block_n=block_n, elements=elements, num_warps=warps)
            return
        for block_n, block_k, warps, stages in TILES_OF_PAIRS[f"{kind} {product}"]:
            yield replace(own, block_n=block_n, block_k=block_k, num_warps=warps, stages=stages)
        if kind == "many":
            yield replace(own, group_m=16)
        return
    if isinstance(own, RowConfig):
        for block_n, elements, warps in (
            (1, 1024, 4), (2, 512, 4), (2, 1024, 4), (4, 256, 2), (4, 256, 4), (4, 512, 4), (4, 1024, 8), (8, 256, 4),
            (8, 512, 8), (16, 128, 4),
        ):  # fmt: skip
            yield replace(own, block_n=block_n, elements=elements, num_warps=warps)
        yield replace(own, stages=2)
        return
    if kind == "few":
        for block_n, block_k, warps, stages in (
            (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 2),
            (128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 4, 3), (128, 128, 8, 3),
        ):  # fmt: skip
            yield replace(own, block_n=block_n, block_k=block_k, num_warps=warps, stages=stages)
        return
    for block_n, block_k, warps, stages in (
        (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4),
        (256, 64, 8, 3), (256, 64, 8, 4),
    ):  # fmt: skip
        if product == "down" or block_n <= 128:
            yield replace(own, block_n=block_n, block_k=block_k, num_warps=warps, stages=stages)
    for group_m in (4, 16, 32):
        yield replace(own, group_m=group_m)


def emitted(layer: Layer, m: int, sweep: bool, folder: Path) -> list[Candidate]:
    """All candidates for m tokens; without other tiles, one module serves every m."""
    return [write(layer, tiles, varied, folder) for varied, tiles in dict.fromkeys(candidates(layer, m, sweep))]


@cache
def write(layer: Layer, tiles: Tiling, varied: str, folder: Path) -> Candidate:
    launcher = emit_moe(layer.graph(), "bench", tiles)
    assert isinstance(launcher, Launcher), launcher
    path = folder / f"{layer.shape}-{layer.kind}-{len(list(folder.glob('*.py')))}.py"
    write_module(path, [launcher])
    return Candidate(tiles, varied, path)


class Recorder:
    """Stands for a kernel, and notes its launches."""

    def __init__(self, name: str, into: list[Any]):
        self.name, self.into = name, into

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **constants: self.into.append((self.name, arguments, constants))


def launches(candidate: Candidate, layer: Layer, m: int) -> list[tuple[str, list[Any], dict[str, int]]]:
    """The kernels that m tokens launch: their names, pointers as dtypes and numbers as they are, constants."""
    path = candidate.path.with_suffix(f".recorded-{m}.py")
    path.write_text(candidate.path.read_text())
    module, found = load_module(path), []
    for name in [n for n in vars(module) if n.startswith("bench_")]:
        setattr(module, name, Recorder(name, found))
    given = [n.meta["val"] for n in layer.graph().graph.nodes if n.op == "placeholder"]
    made = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta") for v in given]
    made[:3] = [torch.empty(m, *t.shape[1:], dtype=t.dtype, device="meta") for t in made[:3]]
    module.bench(*made)
    path.unlink()
    as_types = lambda a: [x.dtype if isinstance(x, torch.Tensor) else x for x in a]
    return [(name, as_types(arguments), constants) for name, arguments, constants in found]
