"""One decode step's attention over a full cache of codes, beside PyTorch's attention over the same in bfloat16."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import Run, graph_replays, rotated
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fuseline.codegen.kernel import Launcher, Refusal
from fuseline.codegen.module_file import load_module, write_module
from fuseline.codegen.templates import cached as template
from fuseline.codegen.templates.attention import emit_attention
from fuseline.compiler.cached import CacheScheme, Side
from fuseline.compiler.compat import trace
from fuseline.compiler.ops import attention, cache_attention, cache_write

NAMES = ("codes", "scale", "low", "mean", "recent")
BOUND = 1.2e-2  # of bfloat16, over the largest magnitude


@dataclass(frozen=True)
class Shape:
    """A step of one layer: `batch` sequences of `tokens` in the cache, heads of 128 as in Llama-3-8B."""

    batch: int
    tokens: int
    heads: int = 32
    kv_heads: int = 8
    head: int = 128


@dataclass(frozen=True)
class Tuning:
    """What the sweep tries. programs: to divide the blocks among; ptx: whether bytes are spread by `prmt`."""

    warps: int = template.WARPS
    stages: int = template.STAGES
    programs: int = template.PROGRAMS
    ptx: bool = True

    def __str__(self) -> str:
        return f"warps {self.warps} stages {self.stages} programs {self.programs}{'' if self.ptx else ' no ptx'}"


def tunings() -> Iterator[Tuning]:
    """The template's own choice, then others."""
    yield Tuning()
    for warps, stages, programs in itertools.product((4, 8), (3, 2, 4), (396, 264, 528, 792, 1056)):
        yield Tuning(warps, stages, programs)
    yield Tuning(ptx=False)


class Cache:
    """Keys and values of random tokens, as codes and in bfloat16."""

    def __init__(self, shape: Shape, keys: str, values: str, block: int, window: int, device: torch.device, dtype: Any):
        self.shape, self.schemes, self.block = shape, (keys, values), block
        capacity = -(-shape.tokens // block) * block
        self.length = torch.tensor(shape.tokens, device=device)
        size = (shape.batch, shape.kv_heads, shape.tokens, shape.head)
        channels = 1 + torch.rand(shape.head, device=device)
        self.plain = [
            (torch.randn(size, device=device) * channels).to(dtype),
            torch.randn(size, device=device).to(dtype),
        ]
        self.sides = []
        for values_, (text, x) in enumerate(zip(self.schemes, self.plain, strict=True)):
            scheme = CacheScheme.parse(text)
            zeros = lambda *shape_, dtype=dtype: torch.zeros(shape.batch, *shape_, dtype=dtype, device=device)
            parts = {
                name: zeros(*s, dtype=torch.uint8 if name == "codes" else dtype)
                for name, s in scheme.shapes(shape.kv_heads, capacity, shape.head, block, bool(values_)).items()
            }
            recent = zeros(shape.kv_heads, window + block, shape.head)
            side = Side(parts["codes"], parts["scale"], parts.get("low"), None, recent, scheme, block, bool(values_))
            for start in range(0, shape.tokens, 4096):
                side.write(x[:, :, start : start + 4096], torch.tensor(start, device=device))
            self.sides.append(side)

    def parts(self) -> list[torch.Tensor | None]:
        return [getattr(side, name) for side in self.sides for name in NAMES]

    def bytes(self) -> int:
        """That a step reads: coded blocks with their scales, and what of the ring is in use."""
        coded = int(self.sides[0].coded(self.length))
        total = 0
        for side in self.sides:
            share = coded / side.capacity
            held = [side.codes, side.scale, *([] if side.low is None else [side.low])]
            total += sum(int(t.numel() * t.element_size() * share) for t in held)
            recent = (self.shape.tokens - coded) * side.recent.shape[3] * side.recent.element_size()
            total += self.shape.batch * self.shape.kv_heads * recent
        return total


def attend(cache: Cache, masked: bool) -> Callable[..., torch.Tensor]:
    """The op of the tensors that `given` lists."""
    absent = [part is None for part in cache.parts()]
    rest = (1 / math.sqrt(cache.shape.head), "full", *cache.schemes, cache.block)

    def run(q: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        taken = iter(tensors)
        parts = [None if missing else next(taken) for missing in absent]
        return cache_attention(q, *parts, next(taken), next(taken) if masked else None, *rest)

    return run


def given(cache: Cache, q: torch.Tensor, masked: bool) -> list[torch.Tensor]:
    capacity = cache.sides[0].capacity
    seen = torch.arange(capacity, device=q.device).expand(cache.shape.batch, 1, 1, -1) < cache.length
    return [q, *(p for p in cache.parts() if p is not None), cache.length, *([seen] if masked else [])]


def loaded(launcher: Launcher | Refusal, folder: Path) -> Callable[..., Any]:
    if isinstance(launcher, Refusal):
        raise RuntimeError(launcher.reason)
    path = folder / f"bench_{len(list(folder.iterdir()))}.py"
    write_module(path, [launcher])
    return getattr(load_module(path), launcher.name)


def region(function: Callable[..., Any], tensors: list[torch.Tensor]) -> torch.fx.GraphModule:
    mode = FakeTensorMode()
    return trace(function, [mode.from_tensor(t) for t in tensors], mode)


def build(graph: torch.fx.GraphModule, tuning: Tuning, folder: Path) -> Callable[..., Any]:
    chosen = {"WARPS": tuning.warps, "STAGES": tuning.stages, "PROGRAMS": tuning.programs}
    with mock.patch.multiple(template, **chosen):
        launcher = template.emit_cached(graph, "bench")
    if isinstance(launcher, Launcher) and not tuning.ptx:
        launcher = replace(launcher, source=re.sub(r"PTX=[^,]*", "PTX=False", launcher.source))
    return loaded(launcher, folder)


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    gap = (result.double() - exact.double()).abs().max() / exact.double().abs().max()
    return float("inf") if gap.isnan() else float(gap)


def copied(tensors: list[torch.Tensor], copies: int) -> list[list[torch.Tensor]]:
    return [[t.clone() for t in tensors] for _ in range(copies)]


def read(
    row: dict[str, Any],
    shape: Shape,
    keys: str,
    values: str,
    block: int,
    masked: bool,
    sweep: bool,
    run: Run,
    folder: Path,
) -> None:
    """A cache of codes: every tuning is checked against the naive twin, then timed; and PyTorch's attention."""
    device, dtype = run.device, getattr(torch, run.options.dtype)
    cache = Cache(shape, keys, values, block, run.options.window, device, dtype)
    q = torch.randn(shape.batch, shape.heads, 1, shape.head, device=device).to(dtype)
    function, tensors = attend(cache, masked), given(cache, q, masked)
    naive = function(q.float(), *(t.float() if t.is_floating_point() else t for t in tensors[1:]))
    row |= {"keys": keys, "values": values, "block": block, "batch": shape.batch, "tokens": shape.tokens}
    row |= {"mask": masked, "bytes": cache.bytes() + 2 * q.numel() * q.element_size()}
    row["ratio"] = cache.bytes() / sum(x.numel() * x.element_size() for x in cache.plain)
    copies = rotated(row["bytes"], device) if device.type == "cuda" else 1
    rotating, graph = copied(tensors, copies), region(function, tensors)
    found: list[dict[str, Any]] = []
    row["tunings"] = found
    for tuning in tunings() if sweep else [Tuning()]:
        entry: dict[str, Any] = {"tuning": str(tuning)}
        found.append(entry)
        try:
            call = build(graph, tuning, folder)
            poisoned = torch.full_like(naive, math.nan, dtype=dtype).transpose(1, 2).contiguous()
            entry["error"] = error(call(*tensors, out=poisoned), naive)
            if not entry["error"] < BOUND:
                raise RuntimeError(f"error {entry['error']:.1e}")
            timing = graph_replays(lambda i, f=call: f(*rotating[i]), copies, device, run.options.replays)
        except Exception as problem:  # a tuning that does not fit is a result, not a failure of the sweep
            entry["failed"] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
        else:
            entry |= timing.row("us", 1e6)
        if run.seconds_left() < 0:
            break
    row["own_us"], row["own_error"] = found[0].get("us"), found[0].get("error")
    measured = [entry for entry in found if "us" in entry]
    if not measured:
        raise RuntimeError(found[0]["failed"])
    best = min(measured, key=lambda entry: entry["us"])
    row |= {"us": best["us"], "tuning": best["tuning"], "error": best["error"]}
    row["gb_s"] = row["bytes"] / row["us"] / 1e3
    row["share"] = row["gb_s"] * 1e9 / run.rates["bandwidth"] if run.rates else None
    peer = next((r for r in run.rows if r["name"] == f"bf16 x{shape.batch}" and "us" in r), None)
    if peer is not None:
        row |= {"sdpa_us": peer["us"], "speedup": peer["us"] / row["us"]}


def plain(row: dict[str, Any], shape: Shape, run: Run, folder: Path) -> None:
    """The same step over keys and values that are not coded: each backend of PyTorch's attention, and this package's.

    `us` is the fastest of PyTorch's, `own_us` this package's.
    """
    dtype = getattr(torch, run.options.dtype)
    draw = lambda *size: torch.randn(shape.batch, *size, shape.head, device=run.device).to(dtype)
    q, k, v = draw(shape.heads, 1), draw(shape.kv_heads, shape.tokens), draw(shape.kv_heads, shape.tokens)
    copies = rotated(2 * k.numel() * k.element_size(), run.device) if run.device.type == "cuda" else 1
    rotating = copied([k, v], copies)
    groups = shape.heads // shape.kv_heads
    stacked = q.unflatten(1, (-1, groups)).squeeze(3)  # the query heads of a key head as its queries
    candidates: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}
    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    chosen = [None] if run.device.type != "cuda" else [None, *backends]
    for backend in chosen:
        name = "sdpa" if backend is None else f"sdpa {backend.name.partition('_')[0].lower()}"
        gqa = lambda k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        rows = lambda k, v: F.scaled_dot_product_attention(stacked, k, v).unflatten(2, (groups, 1)).flatten(1, 2)
        for kind, function in (("gqa", gqa), ("heads as queries", rows)):
            candidates[f"{name} {kind}"] = _with(backend, function)
    mine = lambda q, k, v: attention(q, k, v, None, 1 / math.sqrt(q.shape[-1]), "full")
    emitted = loaded(emit_attention(region(mine, [q, k, v]), "plain"), folder)
    candidates["fuseline"] = lambda k, v: emitted(q, k, v)
    exact = F.scaled_dot_product_attention(stacked.float(), k.float(), v.float())
    exact = exact.unflatten(2, (groups, 1)).flatten(1, 2)
    timed: dict[str, Any] = {}
    row["every"] = timed
    for name, function in candidates.items():
        try:
            off = error(function(k, v), exact)
            if not off < BOUND:
                raise RuntimeError(f"error {off:.1e}")
            call = lambda i, f=function: f(*rotating[i])
            timed[name] = graph_replays(call, copies, run.device, run.options.replays).median * 1e6
        except Exception as problem:  # a backend that does not take the shape is a result
            timed[name] = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
    numbers = {name: us for name, us in timed.items() if isinstance(us, float) and name.startswith("sdpa")}
    name = min(numbers, key=numbers.__getitem__)
    row |= {"us": numbers[name], "tuning": name, "own_us": timed["fuseline"], "ratio": 1.0}
    row["bytes"] = 2 * k.numel() * k.element_size() + 2 * q.numel() * q.element_size()
    row["gb_s"] = row["bytes"] / row["us"] / 1e3
    row["share"] = row["gb_s"] * 1e9 / run.rates["bandwidth"] if run.rates else None


def _with(backend: Any, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*tensors: torch.Tensor) -> torch.Tensor:
        if backend is None:
            return function(*tensors)
        with sdpa_kernel(backend):
            return function(*tensors)

    return run


def written(row: dict[str, Any], shape: Shape, keys: str, values: str, block: int, run: Run, folder: Path) -> None:
    """One new token into keys and values: `us` where no block is complete yet, `block_us` where one is."""
    device, dtype = run.device, getattr(torch, run.options.dtype)
    small = replace(shape, tokens=min(shape.tokens, 1024))
    cache = Cache(small, keys, values, block, run.options.window, device, dtype)
    x = torch.randn(shape.batch, shape.kv_heads, 1, shape.head, device=device).to(dtype)
    row |= {"keys": keys, "values": values, "batch": shape.batch, "block": block}
    window = run.options.window
    lengths = {"us": small.tokens // 2, "block_us": small.tokens // 2 // block * block + window % block - 1 + block}
    for name, length in lengths.items():
        at, total = torch.tensor(length, device=device), 0.0
        for side in cache.sides:
            text = cache.schemes[side.values]
            parts = [getattr(side, part) for part in NAMES]
            present = [p for p in parts if p is not None]

            def write(*tensors: torch.Tensor, parts: Any = parts, text: str = text, of: bool = side.values) -> None:
                taken = iter(tensors)
                filled = [None if p is None else next(taken) for p in parts]
                cache_write(*filled, next(taken), next(taken), text, block, of)

            call = loaded(template.emit_cached(region(write, [*present, x, at]), "bench"), folder)
            ours, twin = [t.clone() for t in present], [t.clone() for t in present]
            call(*ours, x, at)
            write(*twin, x, at)
            if not all(torch.equal(a, b) for a, b in zip(ours, twin, strict=True)):
                raise RuntimeError(f"{text} at {length}: the kernel writes other codes than its naive twin")
            total += graph_replays(lambda i, f=call, t=(*ours, x, at): f(*t), 20, device, run.options.replays).median
        row[name] = total * 1e6
