"""Sweep the tile sizes of the linear template's kernels on one GPU.

    python benchmarks/linear_kernels.py                         one row, all shapes and formats (under 4 minutes)
    python benchmarks/linear_kernels.py --rows 64 --shapes smollm2.down
    python benchmarks/linear_kernels.py --compile-only          no GPU: every candidate compiles for sm_90

Medians of CUDA-graph replays over rotating weights (more bytes than L2), so weights come from memory as they do in a
decode. Every candidate's result is compared with float64. cuBLAS multiplies the same matrices in bfloat16, without
the norm and the epilogue that the kernels contain. The JSON file holds every candidate. Columns: microseconds of
cuBLAS, of the template's own tiles and of the best ones; bytes of the weights over that; cuBLAS over that.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Run, arguments, graph_replays, rotated
from linears.problems import FORMATS, SHAPES, Problem, candidates, chosen

from fuseline.codegen.dtypes import NAMES
from fuseline.codegen.kernel import Kernel, Launcher, Refusal
from fuseline.codegen.module_file import load_module, write_module
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.templates.anchor import analyse
from fuseline.codegen.templates.config import Tiling, tiling
from fuseline.codegen.templates.linear import emit_linear

BOUND = 1.5e-2  # max|Δ| / max|reference| of a bfloat16 result
DEVICE = torch.device("cuda")
COLUMNS = ("name", "cublas_bf16_us", "default_us", "best_us", "gb_s", "to_cublas", "best", "tried", "failures")
Candidate = tuple[Tiling, Path, Kernel]


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


def error(results: Any, exact: Any) -> float:
    pairs = zip(results, exact) if isinstance(exact, tuple) else [(results, exact)]
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def measure(row: dict[str, Any], problem: Problem, tried: list[Candidate], failures: Iterator[str | None]) -> None:
    """All candidates of one problem."""
    torch.manual_seed(0)
    inputs, first = problem.activations("cuda"), problem.weights("cuda")
    size = sum(t.numel() * t.element_size() for t in first)
    copies = rotated(size, DEVICE)
    weights = [first, *(([t.clone() for t in first]) for _ in range(copies - 1))]
    exact = problem.region(*(t.double() for t in inputs), *(t.double() if t.is_floating_point() else t for t in first))
    found: list[dict[str, Any]] = []
    row |= {"shape": problem.name, "format": problem.format, "bytes": size, "copies": copies, "candidates": found}
    for (tiles, path, _), failure in zip(tried, failures, strict=True):
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
        timing = graph_replays(lambda i, f=function: f(*inputs, *weights[i]), copies, DEVICE)
        entry["us"] = timing.median * 1e6
        entry["spread_us"] = (timing.spread[1] - timing.spread[0]) * 1e6
    summarise(row, problem.rows)


def summarise(row: dict[str, Any], rows: int) -> None:
    """The template's own tiles, the best ones, and what failed."""
    timed = [entry for entry in row["candidates"] if "us" in entry]
    broken = [entry["failed"] for entry in row["candidates"] if "failed" in entry]
    row |= {"tried": len(row["candidates"]), "failures": len(broken)}
    if not timed:
        raise RuntimeError(f"all {len(broken)} candidates failed: {broken[0]}")
    best, own = min(timed, key=lambda entry: entry["us"]), row["candidates"][0]
    row |= {"default_us": own.get("us"), "best_us": best["us"], "best": describe(best["tiles"], rows)}
    row |= {"gb_s": row["bytes"] / best["us"] / 1e3, "to_cublas": row["cublas_bf16_us"] / best["us"]}


def cublas(name: str, rows: int) -> float:
    shape = SHAPES[name]
    n = sum(shape.widths)
    copies = rotated(2 * n * shape.k, DEVICE)
    x = torch.randn(rows, shape.k, device=DEVICE, dtype=torch.bfloat16)
    weights = [torch.randn(n, shape.k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
    return graph_replays(lambda i: F.linear(x, weights[i]), copies, DEVICE).median * 1e6


def describe(tiles: dict[str, Any], rows: int) -> str:
    config = tiles["row"] if rows <= tiles["row_max"] else tiles["tile"]
    return " ".join(str(v) for v in config.values())


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument(
        "--row-max", type=int, help="rows up to which the one-row kernel serves (default: the template's)"
    )
    parser.add_argument("--default-only", action="store_true", help="only the tiles that the template picks")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90 and stop; needs no GPU")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16))
    return parser.parse_args(words)


def emitted(options: argparse.Namespace, folder: Path) -> dict[Problem, list[Candidate]]:
    """Every problem's candidates, each written as a module of its own."""
    jobs: dict[Problem, list[Candidate]] = {}
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
    return jobs


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="fuseline-linear-"))
    jobs = emitted(options, folder)
    print(f"{sum(map(len, jobs.values()))} candidates in {folder}")
    if options.compile_only:
        for problem, tried in jobs.items():
            shared = [compile_kernel(kernel, "sm_90").shared_bytes for _, _, kernel in tried]
            print(f"{problem.name} {problem.format}: {len(tried)} compiled, {max(shared)} bytes of shared memory")
        return
    if options.device != "cuda":
        sys.exit("error: the sweep times kernels on a GPU, and there is none here\n  try: --compile-only")
    flat = [(str(path), kernel.name, kernel, options.rows) for tried in jobs.values() for _, path, kernel in tried]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        failures = iter(list(pool.map(warm, flat, chunksize=4)))
    run = Run(f"linear-{options.rows}rows", options)
    reference = {name: cublas(name, options.rows) for name in options.shapes}
    for problem, tried in jobs.items():
        reasons = iter([next(failures) for _ in tried])

        def fill(
            row: dict[str, Any], problem: Problem = problem, tried: list[Candidate] = tried, reasons: Any = reasons
        ) -> None:
            row["cublas_bf16_us"] = reference[problem.name]
            measure(row, problem, tried, reasons)

        run.measure(f"{problem.name} {problem.format}", fill)
    run.table(COLUMNS)
    print("tiles: one row: block_n elements warps stages; many: block_m block_n block_k group_m warps stages")


if __name__ == "__main__":
    main()
