"""What 4-bit weights cost by each method of `quantize`, and how much of rounding to nearest's cost a method takes away.

    python benchmarks/calibrated.py --device cpu --json benchmarks/results/DATE-cpu-calibrated.json

Log-perplexities of held-out text, in nats: `original` in float32, `quantized` with the row's weights and method; `cost`
is their difference, `recovered` the share of rounding to nearest's cost for the same weights that is gone. `seconds` is
the calibration's time. Calibration and held-out text are halves of the standard library's `pydoc_data.topics`.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from harness import Run, arguments, release
from harness.held_out import HeldOut

import fuseline
from fuseline.models import text

COLUMNS = ("name", "original", "quantized", "cost", "recovered", "seconds")
METHODS = {
    "rtn": ("", "method=rtn"),
    "mse": (":mse", "method=rtn"),
    "hqq": ("", "method=hqq"),
    "awq": ("", "method=awq"),
    "gptq": ("", "method=gptq"),
    "gptq mse": (":mse", "method=gptq"),
    "gptq order": ("", "method=gptq,static,order"),
    "gptq mse order": (":mse", "method=gptq,static,order"),
}
"""What is added to the scheme, and the options."""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--weights", nargs="+", default=["int4:g64:asym", "int4:g64:sym"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--calibration", type=int, default=32, help="windows to calibrate on")
    parser.add_argument("--windows", type=int, default=8, help="windows of held-out text")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--batch", type=int, default=4, help="windows a calibration call")
    return parser.parse_args(words)


class Benchmark(HeldOut):
    """One model and its text, in float32."""

    def __init__(self, options: argparse.Namespace):
        super().__init__(options)
        self.batches = [
            {"input_ids": ids.to(self.device), "use_cache": False}
            for ids in torch.cat(self.cut(text.calibration_text(), options.calibration)).split(options.batch)
        ]
        self.reference = self.log_perplexity(self.original)
        self.nearest: dict[str, float] = {}

    def fill(self, row: dict[str, Any], weights: str, method: str) -> None:
        narrowed, options = METHODS[method]
        pipeline = fuseline.Pipeline(f"raise,quantize{{weights={weights}{narrowed},{options}}}")
        model = copy.deepcopy(self.original)
        started = time.perf_counter()
        plan = fuseline.analyze(model, pipeline, self.batches) if pipeline.needs_data else None
        row |= {"pipeline": str(pipeline), "original": self.reference, "seconds": time.perf_counter() - started}
        row["quantized"] = self.log_perplexity(fuseline.optimize(model, pipeline, plan=plan, target="eager"))
        row["cost"] = row["quantized"] - self.reference
        if method == "rtn":
            self.nearest[weights] = row["cost"]
        if weights in self.nearest:
            row["recovered"] = 1 - row["cost"] / self.nearest[weights]
        release(self.device)


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run, benchmark = Run("calibrated", options, floors=False), Benchmark(options)
    rows = {f"{weights} {method}": (weights, method) for weights in options.weights for method in options.methods}
    run.check(tuple(rows))
    for name, (weights, method) in rows.items():
        run.measure(name, lambda row, weights=weights, method=method: benchmark.fill(row, weights, method))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
