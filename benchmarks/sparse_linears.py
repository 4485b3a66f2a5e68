"""Sparse linears at the shapes of a model on one GPU, against dense ones, cuBLAS and the bytes that are kept.

    python benchmarks/sparse_linears.py                       bfloat16, one row: sweep tiles at 50%, measure the best
    python benchmarks/sparse_linears.py --formats bf16 int8 int4 --rows 1
    python benchmarks/sparse_linears.py --compile-only        no GPU: every candidate compiles for sm_90

Medians of CUDA-graph replays over rotating weights (more bytes than L2). Tiles are swept at the first sparsity; the
best ones are measured at all of them, with and without a low rank, and with every candidate's result held to float64
and to itself (a second call gives the same bits). Channels are dropped by a threshold that is the quantile of the
input, so what is left out is scattered as it is in a model.

Columns, in microseconds: `floor`, the bytes that are kept at the device's bandwidth; `us`; `rank_us` with the low rank;
`dense_us`, this package's dense kernel in the same format; `cublas_us`, bfloat16. The JSON file holds every candidate.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Run, arguments, graph_replays, rotated
from linears.problems import FORMATS, SHAPES, Shape, random_codes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fuseline.codegen.dtypes import NAMES
from fuseline.codegen.kernel import Kernel, Launcher, Refusal
from fuseline.codegen.module_file import load_module, write_module
from fuseline.codegen.offline import compile_kernel
from fuseline.codegen.templates.linear import emit_linear
from fuseline.codegen.templates.sparse import emit_sparse, read, tiles
from fuseline.codegen.templates.sparse_gather import GatherConfig
from fuseline.compiler.ops import dequantize, glu, sparse_linear

BOUND = 1.5e-2  # max|Δ| / max|reference| of a bfloat16 result
DEVICE = torch.device("cuda")
ROWS = {**SHAPES, "llama3-8b.o": Shape(4096, (4096,), 128, "residual")}
COLUMNS = ("name", "floor_us", "us", "rank_us", "dense_us", "cublas_us", "to_dense", "kept_gb_s", "tiles")


@dataclass(frozen=True)
class Problem:
    """One shape in one format; weights are input-major, with groups along the outputs. rank 0: no low-rank branch."""

    name: str
    format: str
    rows: int
    rank: int = 0
    dense: bool = False

    @property
    def shape(self) -> Shape:
        return ROWS[self.name]

    def region(self, x: torch.Tensor, side: torch.Tensor, threshold: torch.Tensor, *given: torch.Tensor) -> Any:
        shape, bits, rest = self.shape, FORMATS[self.format], list(given)
        down = rest.pop(0) if self.rank else None
        results = []
        for n in shape.widths:
            up = rest.pop(0) if self.rank else None
            weight = rest.pop(0)
            if bits:
                group = shape.group if bits == 4 else (shape.k if self.dense else n)
                weight = dequantize(weight, rest.pop(0), None, bits, group, x.dtype)
            results.append(F.linear(x, weight) if self.dense else sparse_linear(x, weight, threshold, down, up))
        if shape.around == "glu":
            return glu(results[0], results[1], "silu")
        return side + results[0] if shape.around == "residual" else tuple(results)

    def inputs(self, device: str, sparsity: float = 0.5) -> list[torch.Tensor]:
        """x, what is added to the result, and the threshold that drops this share of x's channels."""
        x = torch.randn(self.rows, self.shape.k, device=device)
        side = torch.randn(self.rows, self.shape.widths[0], device=device)
        threshold = x.abs().flatten().sort().values[int(sparsity * x.numel()) - 1 if sparsity else 0].reshape(1)
        return [x.bfloat16(), side.bfloat16(), threshold.bfloat16().float() if sparsity else threshold * 0 - 1]

    def weights(self, device: str) -> list[torch.Tensor]:
        shape, bits = self.shape, FORMATS[self.format]
        normal = lambda *size: torch.randn(size, device=device, dtype=torch.bfloat16) * size[-1] ** -0.5
        found = [normal(self.rank, shape.k)] if self.rank else []
        for n in shape.widths:
            rows, columns = (n, shape.k) if self.dense else (shape.k, n)
            if self.rank:
                found.append(normal(self.rank, n))
            if not bits:
                found.append(torch.randn(rows, columns, device=device, dtype=torch.bfloat16) * shape.k**-0.5)
                continue
            found += random_codes(rows, columns, bits, shape, device)
        return found

    def graph(self) -> torch.fx.GraphModule:
        with FakeTensorMode():
            side = torch.empty(self.rows, self.shape.widths[0], dtype=torch.bfloat16)
            x = torch.empty(self.rows, self.shape.k, dtype=torch.bfloat16)
            return make_fx(self.region, tracing_mode="real", pre_dispatch=True)(
                x, side, torch.empty(1), *self.weights("cpu")
            )

    def emit(self, config: GatherConfig | None = None) -> Launcher:
        launcher = emit_linear(self.graph(), "bench") if self.dense else emit_sparse(self.graph(), "bench", config)
        assert isinstance(launcher, Launcher), launcher
        return launcher


def candidates(problem: Problem) -> Iterator[GatherConfig]:
    """The template's own tiles, then others that leave a thread few elements and the device enough programs."""
    sparse = read(problem.graph())
    assert not isinstance(sparse, Refusal), sparse
    yield tiles(sparse)
    stored = max(linear.weight.stored for linear in sparse.anchor.linears)
    total = sum(linear.weight.stored for linear in sparse.anchor.linears)
    least = 16 if total > 8192 else 8
    for chunk, block_k, block_n, warps, stages, compact in itertools.product(
        (128, 256, 512, 1024, 2048), (8, 16, 32), (128, 256, 512, 1024), (4, 8), (1, 3), (True, False)
    ):
        share, programs = block_k * block_n / (32 * warps), total / block_n * problem.shape.k / chunk
        if least <= share <= 64 and 128 <= programs <= 3000 and block_n < 2 * stored:
            yield GatherConfig(chunk, block_k, block_n, compact, warps, stages)


def warm(job: tuple[str, Sequence[Kernel], int]) -> str | None:
    """Compiles a module's kernels into Triton's cache, in a process of its own; the error's first line, if any."""
    path, kernels, rows = job
    dtypes = {f"*{short}": dtype for dtype, (_, short) in NAMES.items()} | {"*i32": torch.int32}
    try:
        for kernel in kernels:
            pointers = [dtypes[kind] for kind in kernel.signature.values() if kind.startswith("*")]
            options = {**kernel.constants, "num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
            getattr(load_module(Path(path)), kernel.name).warmup(*pointers, rows, **options, grid=(1,))
    except Exception as error:  # a tile that does not fit is a result, not a failure of the sweep
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


class Measured:
    """The operands of one problem, as many copies as the cache cannot hold."""

    def __init__(self, problem: Problem, sparsity: float):
        torch.manual_seed(0)
        self.inputs, first = problem.inputs(str(DEVICE), sparsity), problem.weights(str(DEVICE))
        self.size = sum(t.numel() * t.element_size() for t in first)
        self.copies = rotated(self.size, DEVICE)
        self.weights = [first, *([t.clone() for t in first] for _ in range(self.copies - 1))]
        wide = lambda t: t.double() if t.is_floating_point() else t
        self.exact = problem.region(*map(wide, self.inputs), *map(wide, first))

    def time(self, function: Any) -> dict[str, Any]:
        """Median and spread in microseconds, and how far the result is from float64."""
        first, again = (function(*self.inputs, *self.weights[0]) for _ in range(2))
        pairs = list(zip(*(r if isinstance(r, tuple) else (r,) for r in (first, again, self.exact)), strict=True))
        error = max(float((a.double() - e).abs().max() / e.abs().max()) for a, _, e in pairs)
        if not error < BOUND:
            raise RuntimeError(f"error {error:.1e}")
        if not all(torch.equal(a, b) for a, b, _ in pairs):
            raise RuntimeError("a second call gave other bits")
        timing = graph_replays(lambda i: function(*self.inputs, *self.weights[i]), self.copies, DEVICE)
        return {"error": error, **timing.row("us", 1e6)}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    shapes = [f"llama3-8b.{name}" for name in ("qkv", "o", "gate_up", "down")]
    parser.add_argument("--shapes", nargs="+", choices=ROWS, default=shapes)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[50, 40, 60, 70, 0], help="percent dropped")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--default-only", action="store_true", help="only the tiles that the template picks")
    parser.add_argument("--compile-only", action="store_true", help="compile for sm_90 and stop; needs no GPU")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 16))
    return parser.parse_args(words)


def written(problem: Problem, configs: Sequence[GatherConfig | None], folder: Path) -> list[tuple[Path, Launcher]]:
    found = []
    for number, config in enumerate(configs):
        launcher = problem.emit(config)
        kind = "dense" if problem.dense else f"rank{problem.rank}"
        path = folder / f"{problem.name}-{problem.format}-{kind}-{number}.py"
        write_module(path, [launcher])
        found.append((path, launcher))
    return found


class Sweep:
    """One shape and format: all candidates at the first sparsity, the best at all of them."""

    def __init__(self, options: argparse.Namespace, run: Run, folder: Path):
        self.options, self.run, self.folder = options, run, folder
        self.best: dict[tuple[str, str], GatherConfig] = {}
        self.dense: dict[tuple[str, str], tuple[float, float]] = {}

    def tiles(self, row: dict[str, Any], problem: Problem) -> None:
        configs = list(dict.fromkeys(candidates(problem)))[: 1 if self.options.default_only else None]
        modules = written(problem, configs, self.folder)
        jobs = [(str(path), launcher.kernels, problem.rows) for path, launcher in modules]
        with ProcessPoolExecutor(self.options.processes, multiprocessing.get_context("spawn")) as pool:
            failures = list(pool.map(warm, jobs, chunksize=2))
        operands = Measured(problem, self.options.sparsity[0] / 100)
        row["candidates"] = found = []
        for config, (path, _), failure in zip(configs, modules, failures, strict=True):
            entry: dict[str, Any] = {"tiles": asdict(config)}
            found.append(entry)
            try:
                if failure:
                    raise RuntimeError(failure)
                entry |= operands.time(load_module(path).bench)
            except RuntimeError as error:
                entry["failed"] = str(error).splitlines()[0]
        timed = [entry for entry in found if "us" in entry]
        if not timed:
            raise RuntimeError(f"all candidates failed: {found[0]['failed']}")
        best = min(timed, key=lambda entry: entry["us"])
        self.best[problem.name, problem.format] = GatherConfig(**best["tiles"])
        row |= {"us": best["us"], "tiles": show(best["tiles"]), "own_us": found[0].get("us"), "tried": len(found)}
        row["failures"] = len(found) - len(timed)

    def baselines(self, problem: Problem) -> tuple[float, float]:
        """Microseconds of the dense kernel in this format, and of cuBLAS in bfloat16."""
        key = problem.name, problem.format
        if key not in self.dense:
            plain = Problem(problem.name, problem.format, problem.rows, dense=True)
            [(path, _)] = written(plain, [None], self.folder)
            ours = Measured(plain, 0.5).time(load_module(path).bench)["us"]
            shape = problem.shape
            size = sum(shape.widths)
            copies = rotated(2 * size * shape.k, DEVICE)
            x = torch.randn(problem.rows, shape.k, device=DEVICE, dtype=torch.bfloat16)
            weights = [torch.randn(size, shape.k, device=DEVICE, dtype=torch.bfloat16) for _ in range(copies)]
            theirs = graph_replays(lambda i: F.linear(x, weights[i]), copies, DEVICE).median * 1e6
            self.dense[key] = ours, theirs
        return self.dense[key]

    def measure(self, row: dict[str, Any], problem: Problem, sparsity: float) -> None:
        config = self.best.get((problem.name, problem.format))
        row |= {"sparsity": sparsity, "rows": problem.rows}
        row["dense_us"], row["cublas_us"] = self.baselines(problem)
        for key, rank in (("us", 0), ("rank_us", self.options.rank)):
            kind = Problem(problem.name, problem.format, problem.rows, rank)
            [(path, launcher)] = written(kind, [config], self.folder)
            operands = Measured(kind, sparsity / 100)
            row |= {k.replace("us", key, 1): v for k, v in operands.time(load_module(path).bench).items()}
            if not rank:
                row["kept_bytes"] = operands.size * (1 - sparsity / 100)
                row["floor_us"] = row["kept_bytes"] / self.run.rates["bandwidth"] * 1e6
        row["to_dense"] = row["dense_us"] / row["us"]
        row["kept_gb_s"] = row["kept_bytes"] / row["us"] / 1e3
        row["tiles"] = show(asdict(config)) if config else "own"


def show(settings: dict[str, Any]) -> str:
    """chunk, block_k, block_n, whether compacted, warps, stages, columns of the second kernel."""
    return " ".join(str(int(value)) for value in settings.values())


def main() -> None:
    options = parse()
    folder = Path(tempfile.mkdtemp(prefix="fuseline-sparse-"))
    problems = [Problem(name, form, options.rows) for name in options.shapes for form in options.formats]
    if options.compile_only:
        for problem in problems:
            configs = list(dict.fromkeys(candidates(problem)))[: 1 if options.default_only else None]
            for rank in (0, options.rank):
                kind = Problem(problem.name, problem.format, problem.rows, rank)
                launchers = [kind.emit(config) for config in (configs if not rank else configs[:1])]
                shared = [compile_kernel(k, "sm_90").shared_bytes for one in launchers for k in one.kernels]
                title = f"{problem.name} {problem.format} rank {rank}"
                print(f"{title}: {len(launchers)} compiled, {max(shared)} bytes of shared memory")
        return
    if options.device != "cuda":
        sys.exit("error: the sweep times kernels on a GPU, and there is none here\n  try: --compile-only")
    run = Run(f"sparse-linears-{options.rows}rows", options)
    sweep = Sweep(options, run, folder)
    for problem in problems:
        title = f"{problem.name} {problem.format}"
        run.measure(f"{title} tiles", lambda row, p=problem: sweep.tiles(row, p))
        for sparsity in options.sparsity:
            run.measure(f"{title} {sparsity:g}%", lambda row, p=problem, s=sparsity: sweep.measure(row, p, s))
    run.table(COLUMNS)
    print("tiles: chunk block_k block_n compact warps stages finish_n")


if __name__ == "__main__":
    main()
