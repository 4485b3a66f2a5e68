"""Fake quantization of one weight, forward and backward: our kernels, the ops' naive twins, and the memory's floor.

    python benchmarks/fake_quantize.py --device cuda
    TRITON_INTERPRET=1 python benchmarks/fake_quantize.py --device cpu --shapes 8x64 --dtype float32

Medians of CUDA-graph replays over rotating buffers, in microseconds. The floor is what is read and written, forward
two and backward three times the weight, at the bandwidth that the same run measures.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import Run, arguments, graph_replays

from fuseline.compiler.formats import FORMATS
from fuseline.compiler.formats.learned import initial_range
from fuseline.compiler.ops import fake_quantize, fake_quantize_backward, round_through
from fuseline.runtime import fake_quantize as launches

COLUMNS = (
    "name",
    "forward_us",
    "naive_us",
    "forward_floor_us",
    "backward_us",
    "naive_backward_us",
    "backward_floor_us",
)
COPIES = 8


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "28672x4096", "4096x14336"])
    parser.add_argument("--formats", nargs="+", default=["int4", "midrise2", "ternary", "binary"])
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    return parser.parse_args(words)


class Benchmark:
    def __init__(self, options: argparse.Namespace, bandwidth: float):
        self.device, self.dtype = torch.device(options.device), getattr(torch, options.dtype)
        self.bandwidth = bandwidth

    def time(self, call: Callable[[int], Any]) -> float:
        return graph_replays(call, COPIES, self.device, 5).median * 1e6

    def learned(self, row: dict[str, Any], rows: int, channels: int, format: str) -> None:
        x, grad = (
            [torch.randn(rows, channels, device=self.device, dtype=self.dtype) for _ in range(COPIES)] for _ in range(2)
        )
        alpha = initial_range(x[0].unsqueeze(1), FORMATS[format].element).squeeze(-1)
        row["forward_us"] = self.time(lambda i: launches.forward(x[i % COPIES], alpha, format, channels))
        row["naive_us"] = self.time(lambda i: fake_quantize.naive(x[i % COPIES], alpha, format, channels))
        backward = lambda run: self.time(lambda i: run(grad[i % COPIES], x[i % COPIES], alpha, format, channels))
        row["backward_us"], row["naive_backward_us"] = (
            backward(launches.backward),
            backward(fake_quantize_backward.naive),
        )
        size = x[0].numel() * x[0].element_size() / self.bandwidth * 1e6
        row |= {"forward_floor_us": 2 * size, "backward_floor_us": 3 * size}

    def straight(self, row: dict[str, Any], rows: int, channels: int) -> None:
        x = [torch.randn(rows, channels, device=self.device, dtype=self.dtype) for _ in range(COPIES)]
        row["forward_us"] = self.time(lambda i: launches.through(x[i % COPIES], "int4:sym", True))
        row["naive_us"] = self.time(lambda i: round_through.naive(x[i % COPIES], "int4:sym", True))
        row["forward_floor_us"] = 2 * x[0].numel() * x[0].element_size() / self.bandwidth * 1e6


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run = Run("fake-quantize", options)
    benchmark = Benchmark(options, run.rates["bandwidth"])
    for shape in options.shapes:
        rows, channels = map(int, shape.split("x"))
        for format in options.formats:
            fill = lambda row, at=(rows, channels, format): benchmark.learned(row, *at)
            run.measure(f"{shape} {format} learned", fill)
        run.measure(f"{shape} int4 min-max", lambda row, at=(rows, channels): benchmark.straight(row, *at))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
