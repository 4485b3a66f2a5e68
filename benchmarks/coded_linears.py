"""Linears with coded weights at the shapes of Llama-3-8B, beside cuBLAS, torchao, gemlite and the floor.

    python benchmarks/coded_linears.py                                       one table; about six minutes on an H200
    python benchmarks/coded_linears.py --kinds w4a16 --batches 1 16          some of it
    python benchmarks/coded_linears.py --kinds w4a16 --batches 1 --sweep     other tiles, too
    python benchmarks/coded_linears.py --compile-only --sweep                no GPU: every kernel compiles for sm_90

Every kernel's result is compared with float64 before it is timed, its buffers poisoned. Times are medians of CUDA-graph
replays over rotating weights (more bytes than L2), in microseconds: `ours` with the tiles that the template picks and,
where activations are coded, with the kernel that codes them; `product` without it; `best` of the tiles tried. `floor`
is the larger of the bytes that cannot be avoided over the measured bandwidth and the operations over the measured rate
of a large product of those types. Peers (PyPI: torchao, gemlite) are left out where they are not installed or have no
such kernel; theirs take a bfloat16 input, too, and round their own weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Run, arguments, graph_replays, rotated
from linears.coded import DEFAULT, KINDS, SHAPES, Candidate, Problem, emitted, quantizer, size_of
from linears.peers import gemlite_layer, torchao_layer

from fuseline.codegen.dtypes import NAMES
from fuseline.codegen.kernel import Kernel
from fuseline.codegen.module_file import load_module
from fuseline.codegen.offline import compile_kernel

BATCHES = (1, 4, 16, 64, 256)
BOUND = 1.5e-2  # max|Δ| / max|reference| of a bfloat16 result
DEVICE = torch.device("cuda")
COLUMNS = (
    "name", "cublas_us", "torchao_us", "gemlite_us", "ours_us", "product_us", "best_us", "floor_us", "of_floor",
    "to_cublas", "best",
)  # fmt: skip


def warm(job: tuple[str, Kernel, int]) -> str | None:
    """Compiles one kernel into Triton's cache, in a process of its own; the error's first line, if any."""
    path, kernel, m = job
    dtypes = {f"*{short}": dtype for dtype, (_, short) in NAMES.items()}
    pointers = [dtypes[kind] for kind in kernel.signature.values() if kind.startswith("*")]
    block_m = kernel.constants["BLOCK_M"] if m > 64 else max(16, 1 << (m - 1).bit_length())
    rows = {"ROWS": 1 << (m - 1).bit_length()} if "ROWS" in kernel.constants else {}
    options = {
        **kernel.constants,
        **rows,
        "BLOCK_M": block_m,
        "num_warps": kernel.num_warps,
        "num_stages": kernel.num_stages,
    }
    try:
        getattr(load_module(Path(path)), kernel.name).warmup(*pointers, m, **options, grid=(1,))
    except Exception as error:  # a tile that does not fit is a result, not a failure of the sweep
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def poisoned(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """A call in which whatever the kernel does not write is NaN."""
    shape = (*inputs[0].shape[:-1],)
    probe = function(*inputs)
    out = torch.full((*shape, probe.shape[-1]), float("nan"), dtype=probe.dtype, device=probe.device)
    name = next(n for n in function.__code__.co_varnames if n.endswith("_out"))
    return function(*inputs, **{name: out})


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


def ours(row: dict[str, Any], problem: Problem, m: int, tried: list[Candidate], folder: Path) -> None:
    """All candidates of one problem; the first is the template's own."""
    torch.manual_seed(0)
    x, first = problem.x(m, DEVICE), problem.weight(DEVICE)
    inputs = problem.coded(x)
    size = sum(t.numel() * t.element_size() for t in first)
    copies = rotated(size, DEVICE)
    weights = [first, *([t.clone() for t in first] for _ in range(copies - 1))]
    exact = problem.exact(inputs, first)
    found: list[dict[str, Any]] = []
    row |= {"shape": problem.shape, "kind": problem.kind, "batch": m, "bytes": size, "candidates": found}
    for number, candidate in enumerate(tried):
        entry: dict[str, Any] = {"tiles": asdict(candidate.tiles), "size": size_of(candidate.tiles, m)}
        found.append(entry)
        function = candidate.call
        try:
            entry["error"] = error(poisoned(function, *inputs, *first), exact)
        except Exception as failure:
            entry["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
            continue
        if not entry["error"] < BOUND:
            entry["failed"] = f"error {entry['error']:.1e}"
            continue
        timing = graph_replays(lambda i, f=function: f(*inputs, *weights[i]), copies, DEVICE)
        entry["us"] = timing.median * 1e6
        if number == 0:
            row |= timing.row("product_us", 1e6)
            coder = quantizer(problem, folder)
            if coder is not None:
                timing = graph_replays(lambda i, f=function, coder=coder: f(*coder(x), *weights[i]), copies, DEVICE)
            row |= timing.row("ours_us", 1e6)
    timed = [entry for entry in found if "us" in entry]
    if not timed:
        raise RuntimeError(f"all {len(found)} candidates failed: {found[0]['failed']}")
    best = min(timed, key=lambda entry: entry["us"])
    tile = best["tiles"][best["size"]]
    row |= {"best_us": best["us"], "best": " ".join(str(v) for v in tile.values()), "error": found[0].get("error")}


def layers(make: Callable[[str, torch.Tensor], Any], problem: Problem, m: int) -> float | None:
    """Microseconds of a peer's layer, over copies of it; None where it has no such kernel."""
    weight = torch.randn(problem.n, problem.k, device=DEVICE, dtype=torch.bfloat16) * problem.k**-0.5
    x = problem.x(m, DEVICE)
    first = make(problem.kind, weight.clone())
    if first is None:
        return None
    close = error(first(x), F.linear(x.double(), weight.double()))
    bound = 1.0 if problem.scheme.bits < 4 else 0.3
    if not close < bound:
        raise RuntimeError(f"error {close:.1e}")
    copies = min(rotated(problem.n * problem.k * max(problem.scheme.bits, 2) // 8, DEVICE), 24)
    others = [first, *(make(problem.kind, weight.clone()) for _ in range(copies - 1))]
    for other in others:
        other(x)
    return graph_replays(lambda i: others[i](x), copies, DEVICE).median * 1e6


def cublas(problem: Problem, m: int) -> float:
    copies = rotated(2 * problem.n * problem.k, DEVICE)
    x = problem.x(m, DEVICE)
    weights = [torch.randn(problem.n, problem.k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
    return graph_replays(lambda i: F.linear(x, weights[i]), copies, DEVICE).median * 1e6


def rates() -> dict[str, float]:
    """Operations a second of large products of int8 and of e4m3."""
    n = 8192
    a = torch.randint(-100, 100, (n, n), device=DEVICE, dtype=torch.int8)
    found = {"int8": 2 * n**3 / graph_replays(lambda i: torch._int_mm(a, a.t()), 3, DEVICE, 4).median}
    b, one = torch.randn(n, n, device=DEVICE).to(torch.float8_e4m3fn), torch.ones((), device=DEVICE)
    scaled = lambda i: torch._scaled_mm(b, b.t(), one, one, out_dtype=torch.bfloat16)
    return found | {"e4m3": 2 * n**3 / graph_replays(scaled, 3, DEVICE, 4).median}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(DEFAULT))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--sweep", action="store_true", help="try other tiles than those that the template picks")
    parser.add_argument("--peers", nargs="*", choices=("torchao", "gemlite"), default=["torchao", "gemlite"])
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90 and stop; needs no GPU")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16))
    return parser.parse_args(words)


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="fuseline-coded-"))
    problems = [(Problem(s, k), m) for k in options.kinds for s in options.shapes for m in options.batches]
    jobs = {(p, m): emitted(p, m, options.sweep, folder) for p, m in problems}
    print(f"{sum(map(len, jobs.values()))} candidates in {folder}")
    if options.compile_only:
        for (problem, m), tried in jobs.items():
            shared = [compile_kernel(kernel, "sm_90").shared_bytes for c in tried for kernel in c.kernels]
            beyond = sum(s > 227 * 1024 for s in shared)
            name = f"{problem.kind} {problem.shape} {m}"
            print(f"{name}: {len(shared)} kernels, {max(shared)} bytes of shared memory, {beyond} too many")
        return
    if options.device != "cuda":
        sys.exit("error: kernels are timed on a GPU, and there is none here\n  try: --compile-only")
    flat = [(str(c.path), kernel, m) for (_, m), tried in jobs.items() for c in tried for kernel in c.kernels]
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn")) as pool:
        reasons = [reason for reason in pool.map(warm, flat, chunksize=2) if reason]
    print(f"{len(flat)} kernels compiled, {len(reasons)} of them not: {dict.fromkeys(reasons)}")
    run = Run("coded-linears", options)
    operations = {"": run.rates["matmul_flop_s"], **rates()}
    run.record["rates"] |= operations
    baseline: dict[tuple[str, int], float] = {}
    for (problem, m), tried in jobs.items():
        run.measure(
            f"{problem.kind} {problem.shape} {m}",
            partial(fill, problem, m, tried, options, operations, run, baseline, folder),
        )
    run.table(COLUMNS)
    print("best: block_m block_n split warps stages group_m scale_after")


def fill(
    problem: Problem,
    m: int,
    tried: list[Candidate],
    options: argparse.Namespace,
    operations: dict[str, float],
    run: Run,
    baseline: dict[tuple[str, int], float],
    folder: Path,
    row: dict[str, Any],
) -> None:
    """One row: the floor, cuBLAS, ours, then the peers, whose failures are findings."""
    floor = max(
        problem.least_bytes(m) / run.rates["bandwidth"],
        2 * m * problem.n * problem.k / operations[problem.activations],
    )
    key = (problem.shape, m)
    if key not in baseline:
        baseline[key] = cublas(problem, m)
    row |= {"floor_us": floor * 1e6, "cublas_us": baseline[key]}
    ours(row, problem, m, tried, folder)
    row |= {"of_floor": floor * 1e6 / row["ours_us"], "to_cublas": row["cublas_us"] / row["ours_us"]}
    for name, make in (("torchao", torchao_layer), ("gemlite", gemlite_layer)):
        if name in options.peers:
            try:
                row[f"{name}_us"] = layers(make, problem, m)
            except Exception as failure:
                row[f"{name}_failed"] = (
                    f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
                )
            torch.compiler.reset()


if __name__ == "__main__":
    main()
