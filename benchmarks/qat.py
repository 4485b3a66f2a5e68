"""Quantization-aware training at 4, 3, 2, 1.58 and 1 bits: ParetoQ, LLM-QAT's min-max, StatsQ, PARQ and WinQ.

    python benchmarks/qat.py --device cuda --seeds 2 --json benchmarks/results/DATE-GPU-qat.json
    python benchmarks/qat.py --device cpu --quick

A byte-level decoder of Llama's architecture is trained in full precision on the standard library's sources, then on
with each quantizer for the same steps, batches and learning rate; `full precision` goes on as it was. `loss` is the
held-out cross-entropy in nats a byte, a mean over seeds, `spread` its range over them, `accuracy` the share of bytes
that were the most probable one; `cost` is the loss less that of `full precision`, of the same seeds. `published` is
what ParetoQ's table has for MobileLLM-125M, ln(perplexity / that of 16 bits) in nats a token, of about four bytes.
All linears but the head are rounded, one range an output channel.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
from typing import Any

import torch
from harness import Run, arguments, release, replace_defaults
from training import Corpus, Trainer, held_out

import fuseline
from fuseline.models.decoder import TinyDecoder
from fuseline.qat import PARQ, WinQ

COLUMNS = ("name", "weights", "loss", "spread", "accuracy", "cost", "published", "converted", "row_seconds")
PUBLISHED = {"4": 14.1, "3": 15.0, "2": 18.2, "1.58": 20.0, "1": 25.8}
"""Perplexities of MobileLLM-125M by ParetoQ, 15.1 at 16 bits (its repository's table)."""
GRIDS = {"4": "int4:sym", "3": "int3:sym", "2": "midrise2", "1.58": "ternary", "1": "binary"}
MINMAX = {**GRIDS, "2": "int2:sym", "1.58": "int2:sym"}
"""max|w| / 1 is the scale of both: −1, 0 and 1 times max|w|. At 1 bit LLM-QAT has mean|w|, as all others."""
ROWS: dict[str, tuple[str, str, str]] = {
    **{f"ParetoQ {bits}": (bits, GRIDS[bits], "paretoq") for bits in GRIDS},
    **{f"LLM-QAT min-max {bits}": (bits, MINMAX[bits], "rtn") for bits in GRIDS},
    "StatsQ 3": ("3", "midrise3", "rtn"),
    "StatsQ 2": ("2", "midrise2", "rtn"),  # LLM-QAT's code has the same at 2 bits
    "BitNet 1.58": ("1.58", "ternary", "rtn"),
    **{f"PARQ {bits}": (bits, GRIDS[bits], "parq") for bits in GRIDS},
    **{f"WinQ {bits}": (bits, GRIDS[bits], "winq") for bits in GRIDS},
}
"""Name → bits, scheme, method; WinQ is ParetoQ with its resets."""


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="bytes a window")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--bytes", type=int, default=16_000_000, help="of text, held out or not")
    parser.add_argument("--windows", type=int, default=512, help="held-out windows")
    parser.add_argument("--steps", type=int, default=2000, help="in full precision, before any rounding")
    parser.add_argument("--qat-steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--qat-rate", type=float, default=5e-4)
    parser.add_argument("--resets", type=int, default=3, help="of WinQ, in the first half of its steps")
    parser.add_argument("--mix", type=float, default=0.1, help="of WinQ: how far weights are set back")
    parser.add_argument("--noise", type=float, default=0.0, help="of WinQ, as a part of a weight's root mean square")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="CUDA graphs of steps")
    parser.add_argument("--converted", action="store_true", help="measure the converted model of the first seed, too")
    parser.add_argument("--quick", action="store_true", help="a model and steps that a CPU does in minutes")
    options = parser.parse_args(words)
    if options.quick:
        small = {"hidden": 64, "layers": 2, "heads": 4, "length": 64, "batch": 16, "bytes": 1_000_000}
        small |= {"windows": 128, "steps": 400, "qat_steps": 100, "rate": 3e-3, "qat_rate": 1e-3}
        replace_defaults(parser, options, small)
    return options


class Benchmark:
    """The text, and one model a seed trained in full precision."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        torch.set_float32_matmul_precision("high")
        self.corpus = Corpus(options.bytes, self.device)
        self.windows = list(self.corpus.windows(options.windows, options.batch, options.length))
        self.models = [self.trained(seed) for seed in range(options.seeds)]
        self.reference = [held_out(model, self.windows)[0] for model in self.models]
        self.continued: list[float] = []

    def trained(self, seed: int) -> TinyDecoder:
        o = self.options
        torch.manual_seed(seed)
        model = TinyDecoder(256, o.hidden, o.layers, o.heads, o.heads // 2)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=o.hidden**-0.5)
        model = model.to(self.device)
        self.train(model, self.adam(model, o.rate), o.rate, o.steps, seed, f"full precision, seed {seed}", warm=50)
        return model

    def adam(self, model: torch.nn.Module, rate: float) -> torch.optim.AdamW:
        wanted = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(wanted, rate, betas=(0.9, 0.95), weight_decay=0.0, fused=self.device.type == "cuda")

    def train(
        self, model: torch.nn.Module, optimizer: Any, rate: float, count: int, seed: int, what: str, warm: int
    ) -> None:
        batches = self.corpus.batches(count, self.options.batch, self.options.length, seed)
        graph = self.device.type == "cuda" and self.options.graphs
        Trainer(model, optimizer, rate, graph).train(batches, count, what, warm)

    def fill(self, row: dict[str, Any], name: str) -> None:
        """A row for one way of training on; of all seeds."""
        found = [self.one(row, name, seed) for seed in range(self.options.seeds)]
        losses, accuracies = zip(*found, strict=True)
        if name == "full precision":
            self.continued = list(losses)
        mean = lambda values: sum(values) / len(values)
        row |= {"loss": mean(losses), "losses": list(losses), "accuracy": mean(accuracies)}
        row["spread"] = max(losses) - min(losses) if len(losses) > 1 else None
        row["before"] = mean(self.reference)
        if self.continued:
            row["cost"] = mean(losses) - mean(self.continued)

    def one(self, row: dict[str, Any], name: str, seed: int) -> tuple[float, float]:
        o = self.options
        model = copy.deepcopy(self.models[seed])
        count, order, what = o.qat_steps, seed + 1000, f"{name}, seed {seed}"
        if name == "full precision":
            self.train(model, self.adam(model, o.qat_rate), o.qat_rate, count, order, what, warm=10)
            return held_out(model, self.windows)
        bits, weights, method = ROWS[name]
        row |= {"bits": bits, "weights": weights, "published": math.log(PUBLISHED[bits] / 15.1)}
        pipeline = f"raise,quantize{{weights={weights},method={'paretoq' if method == 'winq' else method}}}"
        qat = fuseline.prepare_qat(model, pipeline, self.windows[0][:, :-1], dropout=False)
        optimizer: Any = self.adam(qat, o.qat_rate)
        if method == "parq":
            optimizer = PARQ(optimizer, qat, start=count // 10, end=count * 8 // 10)
        elif method == "winq":
            every = max(1, count // (2 * o.resets))
            optimizer = WinQ(optimizer, qat, every=every, mix=o.mix, noise=o.noise, until=every * o.resets)
        self.train(qat, optimizer, o.qat_rate, count, order, what, warm=10)
        found = held_out(qat, self.windows)
        if o.converted and seed == 0:
            row["converted"] = held_out(fuseline.convert(qat, target="eager"), self.windows)[0]
        release(self.device)
        return found


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run = Run("qat", options, floors=False)
    names = ("full precision", *ROWS)
    run.check(names)
    benchmark = Benchmark(options)
    run.record["corpus"] = {
        "training": len(benchmark.corpus.training),
        "held_out": len(benchmark.corpus.held_out),
        "python": platform.python_version(),
        "parameters": sum(p.numel() for p in benchmark.models[0].parameters()),
        "loss_before": benchmark.reference,
    }
    benchmark.continued = next((row["losses"] for row in run.rows if row["name"] == "full precision"), [])  # --resume
    for name in names:
        run.measure(name, lambda row, name=name: benchmark.fill(row, name))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
