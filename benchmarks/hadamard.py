"""Hadamard transforms beside a device copy of the same rows, which is as fast as one read and one write can be.

    python benchmarks/hadamard.py                                 all sizes on one GPU (about 3 minutes)
    python benchmarks/hadamard.py --sizes 11008 --sweep           other tiles: rows at once, warps, programs
    python benchmarks/hadamard.py --device cpu --sizes 576 --megabytes 0.01 --rows 1 --dtype float16
                                                                  tries it out (TRITON_INTERPRET=1)

Medians of CUDA-graph replays over rotating rows (more bytes than L2), bfloat16. Rows of the table: `SIZE MB` for so
many bytes of input, `SIZE xROWS` for few rows, `SIZE codes …` for SwiGLU → transform → int8 codes in one kernel beside
SwiGLU → codes without the transform. Columns: microseconds of the copy, of the kernel, of fast-hadamard-transform
where it is installed; the kernel over the copy, and their difference; gigabytes read and written in a second; the
error against float64, over that of the naive twin.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from harness import Run, Timing, arguments, graph_replays, rotated
from torch._subclasses.fake_tensor import FakeTensorMode

from fuseline.codegen.emitter import emit_region
from fuseline.codegen.kernel import Refusal
from fuseline.codegen.module_file import load_module, write_module
from fuseline.codegen.templates import hadamard as template
from fuseline.codegen.templates.hadamard_layout import Layout, layout, power_of_two
from fuseline.codegen.values import Blocks
from fuseline.compiler.compat import trace
from fuseline.compiler.expressions import online_core
from fuseline.compiler.hadamard import factor
from fuseline.compiler.ops import glu, hadamard, quantize

SIZES = (4096, 11008, 14336, 18944)
COLUMNS = ("name", "copy_us", "kernel_us", "peer_us", "ratio", "over_us", "gb_s", "error", "to_naive", "tile")
Host = Callable[..., Any]


class Tile(Layout):
    """A layout with blocks of its own, for the sweep."""

    chosen: Blocks

    @property
    def blocks(self) -> Blocks:
        return self.chosen


def tile(cut: Layout, blocks: Blocks) -> Tile:
    made = Tile(**asdict(cut))
    object.__setattr__(made, "chosen", blocks)
    return made


def tiles(n: int, order: int, rows: int) -> Iterator[Tile]:
    """The template's own tile, then others: products of 64 or 128 rows, rows at once, programs that walk or do not."""
    own = layout(n, order)
    yield tile(own, own.blocks)
    if own.parted:
        for programs in (132, 264, 396, 528, 660, 792):
            for ahead in (True, False):
                yield tile(own, replace(own.blocks, programs=programs, ahead=ahead))
    cuts = set() if own.parted else {own}
    for piece in (64, 128):
        fits = [a for a in range((n // order).bit_length()) if order << a <= piece]
        if fits:
            whole = power_of_two(order << fits[-1])
            cuts.add(Layout(n, order, fits[-1], whole, whole))
        elif power_of_two(order) >= piece:
            cuts.add(Layout(n, order, 0, piece, 64))
    for cut in sorted(cuts, key=asdict_values):
        for at_once in (1, 2, 4, 8):
            if at_once < cut.least_rows or at_once > max(rows, cut.least_rows):
                continue
            warps = 4 * max(1, cut.piece // 64)
            sums = -(-cut.rows // cut.piece) * cut.piece * cut.columns * at_once
            if sums > 192 * 32 * warps:
                continue
            for programs in (132, 264, 396, 528, 1 << 20):
                blocks = Blocks(at_once, cut.least_rows, warps, programs)
                if (cut, blocks) != (own, own.blocks):
                    yield tile(cut, blocks)


def asdict_values(cut: Layout) -> tuple[int, ...]:
    return tuple(asdict(cut).values())


def build(function: Host, given: list[torch.Tensor], folder: Path, cut: Layout | None = None) -> Host:
    """The host function of `function` for inputs of these shapes, cut as `cut` says or as the template does."""
    mode = FakeTensorMode()
    region = trace(function, [mode.from_tensor(t) for t in given], mode)
    choice = mock.patch.object(template, "layout", lambda *_: cut) if cut else contextlib.nullcontext()
    with choice:
        launcher = emit_region(region, "bench")
    if isinstance(launcher, Refusal):
        raise RuntimeError(launcher.reason)
    path = folder / f"bench_{len(list(folder.iterdir()))}.py"
    write_module(path, [launcher])
    return load_module(path).bench


def timed(call: Callable[[int], Any], copies: int, device: torch.device) -> Timing:
    return graph_replays(call, copies, device, replays=30 if device.type == "cuda" else 1)


def compared(result: torch.Tensor, exact: torch.Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


def prepared(n: int, rows: int, run: Run) -> tuple[torch.device, torch.dtype, list[torch.Tensor], bool, int, int]:
    """Device, dtype, the core if there is one and whether it holds signs, an input's bytes, how many to rotate over."""
    device, dtype = run.device, getattr(torch, run.options.dtype)
    dense, signs = online_core(n, dtype, device)
    core = [] if dense is None else [dense.evaluate({}.__getitem__)]
    size = rows * n * dtype.itemsize
    copies = rotated(2 * size, device) if device.type == "cuda" else 1  # under the interpreter it is a try
    return device, dtype, core, signs, size, copies


def measure(row: dict[str, Any], n: int, rows: int, run: Run, folder: Path) -> None:
    """One size: the copy, every tile of the kernel, the peer."""
    device, dtype, core, signs, size, copies = prepared(n, rows, run)
    xs = [torch.randn(rows, n, device=device).to(dtype) for _ in range(copies)]
    outs = [torch.empty_like(x) for x in xs]
    row |= {"n": n, "rows": rows, "bytes": 2 * size, "copies": copies}
    row["copy_us"] = timed(lambda i: outs[i].copy_(xs[i]), copies, device).median * 1e6

    def function(x: torch.Tensor, *core: torch.Tensor) -> torch.Tensor:
        return hadamard(x, *(core or (None,)), n, signs)

    few = xs[0][:64]
    exact = function(few.double(), *core)
    naive = compared(function(few, *core), exact)
    found: list[dict[str, Any]] = []
    row["tiles"] = found
    for cut in tiles(n, factor(n).order, rows):
        entry: dict[str, Any] = {"tile": describe(cut)}
        found.append(entry)
        try:
            call = build(function, [xs[0], *core], folder, cut)
            entry["error"] = compared(call(xs[0], *core, out=torch.full_like(xs[0], float("nan")))[:64], exact)
            if not entry["error"] < 1.2e-2:
                raise RuntimeError(f"error {entry['error']:.1e}")
            timing = timed(lambda i, f=call: f(xs[i], *core, out=outs[i]), copies, device)
        except Exception as error:  # a tile that does not fit is a result, not a failure of the sweep
            entry["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            entry |= timing.row("us", 1e6)
        if not run.options.sweep or run.seconds_left() < 0:
            break
    measured = [entry for entry in found if "us" in entry]
    if not measured:
        raise RuntimeError(found[0]["failed"])
    best = min(measured, key=lambda entry: entry["us"])
    row |= {"kernel_us": best["us"], "tile": best["tile"], "error": best["error"], "to_naive": best["error"] / naive}
    if importlib.util.find_spec("fast_hadamard_transform") and n & (n - 1) == 0:
        from fast_hadamard_transform import hadamard_transform

        row["peer_us"] = timed(lambda i: hadamard_transform(xs[i], n**-0.5), copies, device).median * 1e6
    conclude(row)


def codes(row: dict[str, Any], n: int, rows: int, run: Run, folder: Path) -> None:
    """SwiGLU → codes with the transform between, beside the same without it."""
    device, dtype, core, signs, size, copies = prepared(n, rows, run)
    gates, ups = ([torch.randn(rows, n, device=device).to(dtype) for _ in range(copies)] for _ in range(2))

    def plain(gate: torch.Tensor, up: torch.Tensor) -> Any:
        return quantize(glu(gate, up, "silu"), 8, n)

    def rotated_codes(gate: torch.Tensor, up: torch.Tensor, *core: torch.Tensor) -> Any:
        return quantize(hadamard(glu(gate, up, "silu"), *(core or (None,)), n, signs), 8, n)

    row |= {"n": n, "rows": rows, "bytes": 2 * size + rows * (n + 4), "copies": copies}
    without = build(plain, [gates[0], ups[0]], folder)
    with_it = build(rotated_codes, [gates[0], ups[0], *core], folder)
    found, scale = with_it(gates[0], ups[0], *core)
    exact = hadamard(glu(gates[0].double(), ups[0].double(), "silu"), *(core or (None,)), n, signs)
    row["error"] = ((found.double() * scale - exact).abs() / scale).max().item()  # in steps of a code
    row["copy_us"] = timed(lambda i: without(gates[i], ups[i]), copies, device).median * 1e6
    row["kernel_us"] = timed(lambda i: with_it(gates[i], ups[i], *core), copies, device).median * 1e6
    row["tile"] = describe(layout(n, factor(n).order, True))
    conclude(row)


def conclude(row: dict[str, Any]) -> None:
    row |= {"ratio": row["kernel_us"] / row["copy_us"], "over_us": row["kernel_us"] - row["copy_us"]}
    row["gb_s"] = row["bytes"] / row["kernel_us"] / 1e3


def describe(cut: Layout) -> str:
    blocks = cut.blocks
    shape = f"[{cut.piece}, {cut.columns}]" if cut.parted else f"{cut.piece}x{cut.inner} rows {blocks.rows}"
    return f"{shape} warps {blocks.warps} programs {blocks.programs}{' ahead' if blocks.ahead else ''}"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--megabytes", nargs="*", type=float, default=[32, 64, 256])
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--sweep", action="store_true", help="time other tiles, too; the table shows the best")
    return parser.parse_args(words)


def plan(options: argparse.Namespace) -> Iterator[tuple[str, Callable[..., None], int, int]]:
    """Name, what measures it, channels, rows."""
    itemsize = getattr(torch, options.dtype).itemsize
    for n in options.sizes:
        heights = {f"{mb:g} MB": max(1, int(mb * 2**20) // (n * itemsize)) for mb in options.megabytes}
        for label, rows in {**heights, **{f"x{rows}": rows for rows in options.rows}}.items():
            yield f"{n} {label}", measure, n, rows
        for label, rows in heights.items():
            yield f"{n} codes {label}", codes, n, max(1, rows // 2)


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run = Run("hadamard", options)
    run.check([name for name, *_ in plan(options)])
    with tempfile.TemporaryDirectory(prefix="fuseline-bench-") as folder:
        for name, fill, n, rows in plan(options):
            run.measure(name, lambda row, f=fill, n=n, rows=rows: f(row, n, rows, run, Path(folder)))
    run.table(COLUMNS, "microseconds; `ratio` to a device copy, to the kernel without the transform in `codes`")


if __name__ == "__main__":
    main()
