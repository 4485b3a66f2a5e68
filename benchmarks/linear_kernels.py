"""Sweep the tile sizes of the linear template's kernels on one GPU.

    python benchmarks/linear_kernels.py                         one row, all shapes and formats (under 4 minutes)
    python benchmarks/linear_kernels.py --rows 64 --shapes smollm2.down
    python benchmarks/linear_kernels.py --compile-only          no GPU: every candidate compiles for sm_90

Medians of CUDA-graph replays over rotating weights (more bytes than L2), so weights come from memory as they do in a
decode. Every candidate's result is compared with float64. cuBLAS multiplies the same matrices in bfloat16, without
the norm and the epilogue that the kernels contain. The JSON file holds every candidate.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fuseline.codegen.dtypes import NAMES
from fuseline.codegen.kernel import Kernel, Launcher, Refusal
from fuseline.codegen.module_file import load_module, write_module
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.templates.anchor import analyse
from fuseline.codegen.templates.config import RowConfig, TileConfig, Tiling, tiling
from fuseline.codegen.templates.linear import emit_linear
from fuseline.compiler.ops import dequantize, glu, rms_norm

ROTATED_BYTES = 160e6  # three times the L2 of an H100
BOUND = 1.5e-2  # max|Δ| / max|reference| of a bfloat16 result


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
            low, high, dtype = (0, 256, torch.uint8) if bits == 4 else (-127, 128, torch.int8)
            columns, groups = (shape.k // 2, shape.k // shape.group) if bits == 4 else (shape.k, 1)
            found.append(torch.randint(low, high, (n, columns), device=device, dtype=dtype))
            scale = torch.rand(n, groups, device=device) + 0.5
            found.append((scale * shape.k**-0.5 / 2 ** (bits - 2)).bfloat16())
        return found

    def graph(self) -> torch.fx.GraphModule:
        with FakeTensorMode():
            inputs = (*self.activations("cpu"), *self.weights("cpu"))
            return make_fx(self.region, tracing_mode="real", pre_dispatch=True)(*inputs)


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


def warm(job: tuple[str, str, Kernel, int]) -> str | None:
    """Compiles one kernel into Triton's cache, in a process of its own; the error's first line, if any."""
    path, name, kernel, rows = job
    dtypes = {f"*{short}": dtype for dtype, (_, short) in NAMES.items()}
    pointers = [dtypes[kind] for kind in kernel.signature.values() if kind.startswith("*")]
    options = {**kernel.constants, "num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    try:
        getattr(load_module(path), name).warmup(*pointers, rows, **options, grid=(1,))
    except Exception as error:  # a tile that does not fit is a result, not a failure of the sweep
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def microseconds(call: Callable[[int], Any], copies: int, replays: int = 12) -> tuple[float, float]:
    """Median and spread (max − min) of the time of one call, over replays of a graph of `copies` calls."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(copies):
            call(i)
    times = []
    for _ in range(replays + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / copies)
    return statistics.median(times[2:]), max(times[2:]) - min(times[2:])


def error(results: Any, exact: Any) -> float:
    pairs = zip(results, exact) if isinstance(exact, tuple) else [(results, exact)]
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def measure(problem: Problem, jobs: list[tuple[Tiling, str, str | None]]) -> dict[str, Any]:
    """All candidates of one problem: (tiles, the module's path, why it did not compile)."""
    torch.manual_seed(0)
    inputs, first = problem.activations("cuda"), problem.weights("cuda")
    size = sum(t.numel() * t.element_size() for t in first)
    copies = min(max(int(ROTATED_BYTES / size) + 1, 4), 400)
    weights = [first, *(([t.clone() for t in first]) for _ in range(copies - 1))]
    exact = problem.region(*(t.double() for t in inputs), *(t.double() if t.is_floating_point() else t for t in first))
    found = []
    for tiles, path, failure in jobs:
        entry: dict[str, Any] = {"tiles": asdict(tiles)}
        found.append(entry)
        if failure:
            entry["failed"] = failure
            continue
        function = load_module(path).bench
        entry["error"] = error(function(*inputs, *first), exact)
        if not entry["error"] < BOUND:
            entry["failed"] = f"error {entry['error']:.1e}"
            continue
        entry["us"], entry["spread_us"] = microseconds(lambda i, f=function: f(*inputs, *weights[i]), copies)
    return {"bytes": size, "copies": copies, "candidates": found}


def cublas(name: str, rows: int) -> float:
    shape = SHAPES[name]
    n = sum(shape.widths)
    copies = min(max(int(ROTATED_BYTES / (2 * n * shape.k)) + 1, 4), 400)
    x = torch.randn(rows, shape.k, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n, shape.k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    return microseconds(lambda i: F.linear(x, weights[i]), copies)[0]


def describe(tiles: dict[str, Any], rows: int) -> str:
    config = tiles["row"] if rows <= tiles["row_max"] else tiles["tile"]
    return " ".join(str(v) for v in config.values())


def circumstances() -> dict[str, Any]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver.stdout.strip().splitlines()[:1],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument(
        "--row-max", type=int, help="rows up to which the one-row kernel serves (default: the template's)"
    )
    parser.add_argument("--default-only", action="store_true", help="only the tiles that the template picks")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90 and stop; needs no GPU")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--json", type=Path, help="default: results/<date>-<device>-linear-<rows>rows.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="fuseline-linear-"))
    jobs: dict[Problem, list[tuple[Tiling, Path, Kernel]]] = {}
    for name in options.shapes:
        for form in options.formats:
            problem = Problem(name, form, options.rows)
            graph = problem.graph()
            anchor = analyse(graph)
            if isinstance(anchor, Refusal):
                sys.exit(f"{name} {form}: {anchor.reason}")
            default = tiling(anchor)
            if options.row_max is not None:
                default = replace(default, row_max=options.row_max)
            tried = dict.fromkeys(candidates(problem, default))
            for number, tiles in enumerate([default] if options.default_only else tried):
                launcher = emit_linear(graph, "bench", tiles)
                assert isinstance(launcher, Launcher), launcher
                path = folder / f"{name}-{form}-{number}.py"
                write_module(path, [launcher])
                jobs.setdefault(problem, []).append((tiles, path, chosen(launcher, tiles, options.rows)))
    total = sum(map(len, jobs.values()))
    print(f"{total} candidates in {folder}")
    if options.compile_only:
        for problem, entries in jobs.items():
            shared = [compile_kernel(kernel, "sm_90").shared_bytes for _, _, kernel in entries]
            print(f"{problem.name} {problem.format}: {len(entries)} compiled, {max(shared)} bytes of shared memory")
        return
    flat = [(str(path), kernel.name, kernel, options.rows) for entries in jobs.values() for _, path, kernel in entries]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        failures = iter(list(pool.map(warm, flat, chunksize=4)))
    report: dict[str, Any] = {**circumstances(), "rows": options.rows, "problems": []}
    reference = {name: cublas(name, options.rows) for name in options.shapes}
    print(f"{'shape':18} {'format':6} {'cuBLAS':>7} {'default':>8} {'best':>7} {'GB/s':>6} {'ratio':>6}  best tiles")
    for problem, entries in jobs.items():
        measured = measure(problem, [(tiles, str(path), next(failures)) for tiles, path, _ in entries])
        timed = [c for c in measured["candidates"] if "us" in c]
        broken = [c["failed"] for c in measured["candidates"] if "failed" in c]
        report["problems"].append({"shape": problem.name, "format": problem.format, **measured})
        report["problems"][-1]["cublas_bf16_us"] = reference[problem.name]
        if broken:
            print(f"{problem.name:18} {problem.format:6} {len(broken)} candidates failed: {broken[0]}")
        if not timed:
            continue
        best, us = min(timed, key=lambda c: c["us"]), reference[problem.name]
        standard = f"{timed[0]['us']:8.2f}" if timed[0] is measured["candidates"][0] else "  failed"
        rate, tiles_text = measured["bytes"] / best["us"] / 1e3, describe(best["tiles"], options.rows)
        print(
            f"{problem.name:18} {problem.format:6} {us:7.2f} {standard} {best['us']:7.2f} {rate:6.0f} "
            f"{us / best['us']:6.2f}  {tiles_text}",
            flush=True,
        )
    device = report["device"].lower().replace(" ", "-")
    results = Path(__file__).parent / "results"
    target = options.json or results / f"{report['date']}-{device}-linear-{options.rows}rows.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1))
    print(
        f"tiles: one row: block_n elements warps stages; many: block_m block_n block_k group_m warps stages\n{target}"
    )


if __name__ == "__main__":
    main()
