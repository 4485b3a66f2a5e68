"""What the buffer plan does for a step that is launched kernel by kernel: time on the host, and memory.

    python benchmarks/buffers.py                                      on one GPU
    python benchmarks/buffers.py --model-shape tiny --device cpu      tries it out (TRITON_INTERPRET=1)

A model's forward over `--tokens` tokens without captures, once with the arena and once with memory from PyTorch's
caching allocator. Columns: microseconds that the host needs to issue a step, in each way and in turns; allocations a
step; bytes of the intermediates: all of them, the most alive at once, the arena; and the bytes that the caching
allocator has in use at the peak of a step beyond those before it.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from decoding.model import SHAPES, build
from harness import Run, arguments, synchronize

import fuseline
from fuseline.runtime.arena import Plan
from fuseline.runtime.packing import peak

COLUMNS = (
    "name", "arena_us", "plain_us", "arena_allocations", "plain_allocations", "sum_bytes", "peak_bytes", "arena_bytes",
    "arena_peak", "plain_peak",
)  # fmt: skip


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Every region allocates its own results."""
    original = Plan.__call__
    nothing: dict[int, tuple[None, ...]] = {}

    def call(self: Plan, like: torch.Tensor, *sizes: int) -> tuple[None, ...]:
        if id(self) not in nothing:
            nothing[id(self)] = (None,) * len(self.sizes(*sizes))
        return nothing[id(self)]

    Plan.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plan.__call__ = original  # type: ignore[method-assign]


@torch.no_grad()
def fill(row: dict[str, Any], run: Run, tokens: int) -> None:
    options = run.options
    model = build(
        options.model_shape, options.layers, run.device, torch.bfloat16 if run.device.type == "cuda" else torch.float32
    )
    pipeline = "raise,fuse"
    fuseline.optimize(model, pipeline, target="triton", cuda_graphs=False, dynamic=False, leftovers="eager")
    ids = torch.arange(tokens, device=run.device)[None]
    step = lambda: model(input_ids=ids, use_cache=False).logits
    result = step()
    with plain():
        row["equal"] = bool(torch.equal(result, step()))
    (compilation,) = fuseline.reports(model)
    lifetimes, _, total = compilation.executable.run.__globals__["PLAN"].layout()
    row["values"] = len(lifetimes)
    row["sum_bytes"], row["peak_bytes"], row["arena_bytes"] = sum(x.size for x in lifetimes), peak(lifetimes), total
    seconds: dict[str, list[float]] = {"arena": [], "plain": []}
    for name in ("arena", "plain"):
        with plain() if name == "plain" else contextlib.nullcontext():
            step(), step()
            if run.device.type == "cuda":
                synchronize(run.device)
                before = torch.cuda.memory_stats(run.device)
                torch.cuda.reset_peak_memory_stats(run.device)
                step()
                synchronize(run.device)
                after = torch.cuda.memory_stats(run.device)
                key = "allocation.all.allocated"
                row[f"{name}_allocations"] = after[key] - before[key]
                row[f"{name}_peak"] = after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"]
    for _ in range(options.repeats):
        for name in seconds:
            with plain() if name == "plain" else contextlib.nullcontext():
                step()
                synchronize(run.device)
                began = time.perf_counter()
                for _ in range(options.steps):
                    step()
                seconds[name].append((time.perf_counter() - began) / options.steps)
                synchronize(run.device)
    for name, found in seconds.items():
        row[f"{name}_us"] = statistics.median(found) * 1e6
        row[f"{name}_us_spread"] = [min(found) * 1e6, max(found) * 1e6]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model-shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--layers", type=int, help="of the shape (default: all)")
    parser.add_argument("--steps", type=int, default=10, help="timed together, on the host (default: 10)")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 2048])
    run = Run("buffers", parser.parse_args(), floors=False)
    for tokens in run.options.tokens:
        run.measure(f"{tokens} tokens", lambda row, tokens=tokens: fill(row, run, tokens))
    run.table(COLUMNS, "buffers")


if __name__ == "__main__":
    main()
