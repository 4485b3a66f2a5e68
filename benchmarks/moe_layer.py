"""A layer of routed experts at the sizes of real models, beside transformers under Inductor and the floor.

    python benchmarks/moe_layer.py                                            one table
    python benchmarks/moe_layer.py --shapes olmoe --tokens 1 64 --peers       some of it, ours alone
    python benchmarks/moe_layer.py --shapes olmoe --tokens 16 --sweep         other tiles, too
    python benchmarks/moe_layer.py --shapes olmoe --peers --sweep pairs       … of one kind alone
    python benchmarks/moe_layer.py --compile-only --sweep                     no GPU: every kernel compiles for sm_90

bfloat16, SwiGLU, random weights, every expert as likely as any other. `bf16` and `pairs` are one layer with the experts
as they are, and all of them packed in pairs; `int4`, `int8` and `fp8` are codes, as `quantize` makes them. Each is
compared with float32 before it is timed, its result poisoned. Times are medians of CUDA-graph replays over rotating
routings, in microseconds: together they touch more experts than the cache holds. `grouped_mm` and `batched_mm` are
transformers' experts under torch.compile; where one cannot be captured in a CUDA graph it is timed as launched, and the
row says so. The floor is the larger of the bytes of the experts that are touched, over the measured bandwidth, and the
operations, over the rate of a large product.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experts.layer import KINDS, SHAPES, Candidate, Layer, emitted, launches, regime, write
from experts.peers import IMPLEMENTATIONS, peer
from harness import Run, arguments, graph_replays, repeated

from fuseline.codegen.module_file import load_module
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.resources import resources
from fuseline.codegen.templates.moe import emit_moe

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
BOUND = 1.5e-2  # max|Δ| / max|reference| of a bfloat16 result
CHECKED = 16  # tokens that are compared with float32


def warm(job: tuple[Path, str, list[Any], dict[str, int]]) -> str | None:
    """Compiles one kernel into Triton's cache, in a process of its own; the error's first line, if any."""
    path, name, given, constants = job
    try:
        getattr(load_module(path), name).warmup(*given, **constants, grid=(1,))
    except Exception as error:  # a tile that does not fit is a result, not a failure of the sweep
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    gap = (result.double() - exact.double()).abs().max() / exact.abs().max()
    return float("inf") if gap.isnan() else gap.item()


class Bench:
    """The layers of one shape on a device, and what is timed of them."""

    def __init__(self, shape: str, options: argparse.Namespace, run: Run, folder: Path):
        self.shape, self.options, self.run, self.folder = shape, options, run, folder
        self.device = torch.device(options.device)
        torch.manual_seed(0)
        self.layers = {kind: Layer(shape, kind) for kind in options.kinds}
        self.weights = {kind: layer.weights(self.device) for kind, layer in self.layers.items()}

    def copies(self, m: int) -> int:
        """Routings: together they touch a gigabyte of experts, or all of them."""
        layer = Layer(self.shape, "bf16")
        _, _, experts, top = layer.sizes
        return max(3, min(16, int(1e9 / (min(m * top, experts) * layer.expert_bytes)) + 1))

    def fill(self, m: int, tried: dict[str, list[Candidate]], row: dict[str, Any]) -> None:
        """One row: m tokens by every kind and peer."""
        layer = Layer(self.shape, "bf16")
        torch.manual_seed(m)
        hidden = layer.tokens(m, self.device)
        routings = [layer.routing(m, self.device) for _ in range(self.copies(m))]
        row |= {"shape": self.shape, "tokens": m, "routings": len(routings)}
        for kind, own in self.layers.items():
            self.ours(own, m, hidden, routings, tried[kind], row)
            touched = sum(own.touched(indices) for indices, _ in routings) / len(routings)
            bound = touched * own.expert_bytes / self.run.rates["bandwidth"]
            floor = max(bound, own.flops(m) / self.run.rates["matmul_flop_s"])
            row |= {f"{kind}_touched": touched, "floor_us" if kind == "bf16" else f"{kind}_floor_us": floor * 1e6}
        if "bf16_us" in row:
            row["of_floor"] = row["floor_us"] / row["bf16_us"]
            for implementation in self.options.peers:
                self.peer(layer, implementation, m, hidden, routings, row)
                if row.get(f"{implementation}_us"):
                    row[f"to_{implementation}"] = row[f"{implementation}_us"] / row["bf16_us"]
            for kind in self.layers:
                if kind != "bf16":
                    row[f"{kind}_to_bf16"] = row["bf16_us"] / row[f"{kind}_us"]

    def ours(
        self,
        layer: Layer,
        m: int,
        hidden: torch.Tensor,
        routings: list[tuple[torch.Tensor, torch.Tensor]],
        tried: list[Candidate],
        row: dict[str, Any],
    ) -> None:
        """All candidates of one kind; the first is the template's own. Then the best of each product together."""
        weights, kind = self.weights[layer.kind], layer.kind
        count = min(m, CHECKED)
        exact = layer.exact([hidden, *routings[0], *weights], count)
        found: list[dict[str, Any]] = []
        row[f"{kind}_candidates"] = found

        def measure(candidate: Candidate) -> float | None:
            entry: dict[str, Any] = {"varied": candidate.varied, "tiles": asdict(candidate.tiles)}
            found.append(entry)
            function = candidate.call
            try:
                out = torch.full_like(hidden, float("nan"))
                entry["error"] = error(function(hidden, *routings[0], *weights, out=out)[:count], exact)
                if not entry["error"] < BOUND or out.isnan().any():
                    raise RuntimeError(f"error {entry['error']:.1e}")
                call = lambda i: function(hidden, *routings[i], *weights)
                timing = graph_replays(call, len(routings), self.device)
            except Exception as failure:
                entry["failed"] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
                return None
            entry["us"] = timing.median * 1e6
            if not candidate.varied:
                row.update(timing.row(f"{kind}_us", 1e6))
            return timing.median

        times = [(measure(candidate), candidate) for candidate in tried]
        if f"{kind}_us" not in row:
            raise RuntimeError(f"{kind}: {found[0]['failed']}")
        row[f"{kind}_error"] = found[0]["error"]
        if len(tried) > 1:
            name = regime(layer, tried[0].tiles, m)
            stages = {}
            for product in ("up", "down"):
                ranked = [(t, c) for t, c in times if t is not None and c.varied in ("", product)]
                stages[product] = getattr(getattr(min(ranked, key=lambda x: x[0])[1].tiles, name), product)
            own = tried[0].tiles
            both = replace(own, **{name: replace(getattr(own, name), **stages)})
            measure(write(layer, both, "both", self.folder))
            best = min((e for e in found if "us" in e), key=lambda e: e["us"])
            row |= {f"{kind}_best_us": best["us"], f"{kind}_best": best["tiles"][name]}

    def peer(
        self,
        layer: Layer,
        implementation: str,
        m: int,
        hidden: torch.Tensor,
        routings: list[tuple[torch.Tensor, torch.Tensor]],
        row: dict[str, Any],
    ) -> None:
        """transformers' layer; what fails is a finding."""
        try:
            function = peer(layer, implementation, self.weights["bf16"], m)
            if function is None:
                return
            call: Callable[[int], Any] = lambda i: function(hidden, *routings[i])
            with torch.no_grad():
                for _ in range(2):
                    call(0)
                try:
                    timing = graph_replays(call, len(routings), self.device)
                except Exception as failure:
                    row[f"{implementation}_no_graph"] = f"{type(failure).__name__}"
                    timing = repeated(lambda: call(0), 12, self.device, warmup=2)
            row |= timing.row(f"{implementation}_us", 1e6)
        except Exception as failure:
            row[f"{implementation}_failed"] = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
        finally:
            torch.compiler.reset()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[s for s in SHAPES if s != "tiny"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["bf16", "pairs"])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument(
        "--sweep", nargs="*", choices=KINDS, help="try other tiles than the template's, for these kinds, or for all"
    )
    parser.add_argument("--peers", nargs="*", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90 and stop; needs no GPU")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16))
    options = parser.parse_args(words)
    options.sweep = [] if options.sweep is None else options.sweep or list(KINDS)
    return options


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="fuseline-experts-"))
    jobs = {
        (shape, m): {kind: emitted(Layer(shape, kind), m, kind in options.sweep, folder) for kind in options.kinds}
        for shape in options.shapes
        for m in options.tokens
    }
    if options.compile_only:
        compile_only(jobs)
        return
    if options.device != "cuda":
        sys.exit("error: kernels are timed on a GPU, and there is none here\n  try: --compile-only")
    compile_all(jobs, options.processes, folder)
    run = Run("moe-layer", options)
    bench: Bench | None = None
    for (shape, m), tried in jobs.items():
        name = f"{shape} {m}"
        if not run.wanted(name):
            continue
        if bench is None or bench.shape != shape:
            bench = None  # its weights are freed first
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            bench = Bench(shape, options, run, folder)
        run.measure(name, partial(bench.fill, m, tried))
    run.table(columns(options))


def columns(options: argparse.Namespace) -> list[str]:
    found = ["name", *(f"{peer}_us" for peer in options.peers)]
    for kind in options.kinds:
        found += [f"{kind}_us", *([f"{kind}_best_us"] if kind in options.sweep else [])]
        found += ["floor_us" if kind == "bf16" else f"{kind}_floor_us"]
    if "bf16" in options.kinds:
        found += ["of_floor", *(f"to_{peer}" for peer in options.peers)]
        found += [f"{kind}_to_bf16" for kind in options.kinds if kind != "bf16"]
    return found


def compile_all(jobs: dict[tuple[str, int], dict[str, list[Candidate]]], processes: int, folder: Path) -> None:
    """Every kernel that the rows launch, into Triton's cache."""
    flat: dict[str, tuple[Path, str, list[Any], dict[str, int]]] = {}
    for (shape, m), kinds in jobs.items():
        for kind, tried in kinds.items():
            for candidate in tried:
                for name, given, constants in launches(candidate, Layer(shape, kind), m):
                    flat.setdefault(repr((candidate.path, name, constants)), (candidate.path, name, given, constants))
    print(f"{len(flat)} kernels of {len({job[0] for job in flat.values()})} modules in {folder}", flush=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        reasons = [reason for reason in pool.map(warm, flat.values(), chunksize=2) if reason]
    print(f"compiled, {len(reasons)} of them not: {dict.fromkeys(reasons)}", flush=True)


def compile_only(jobs: dict[tuple[str, int], dict[str, list[Candidate]]]) -> None:
    """Registers, spills and shared memory of every kernel, for sm_90."""
    seen: set[Path] = set()
    for (shape, _), kinds in jobs.items():
        for kind, tried in kinds.items():
            for candidate in tried:
                if candidate.path in seen:
                    continue
                seen.add(candidate.path)
                launcher = emit_moe(Layer(shape, kind).graph(), "bench", candidate.tiles)
                for kernel in launcher.kernels:  # type: ignore[union-attr]
                    found = resources(compile_kernel(kernel, "sm_90"))
                    beyond = " too much" if found.shared_bytes > 227 * 1024 else ""
                    print(
                        f"{shape} {kind} {kernel.name} {list(kernel.constants.values())}: {found.registers} registers, "
                        f"{found.spill_bytes} bytes spilled, {found.shared_bytes} of shared memory{beyond}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
