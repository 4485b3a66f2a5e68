"""Rotations before a quantization to 4 bits: ours beside the published recipes, with the same quantizers and text.

    python benchmarks/rotation.py --jobs 6              SmolLM2-135M on one GPU (about 6 minutes)
    python benchmarks/rotation.py --device cpu --only original plain "ours hadamard" --windows 4
    python benchmarks/rotation.py --device cpu --model demo:tiny-llama --steps 2     tries it out

Rows: `plain` without rotations; `published hadamard` (QuaRot: random signs, the embedding centred and untied) and
`published learned` (SpinQuant: R1 and R2 by Cayley SGD at rate 1.5 on the next-token loss, the embedding centred);
`ours …` without centring, learned on the divergence from the original. Medians over `--seeds`. Columns: perplexity on
held-out text, log-perplexity over the original's, KL to the original and the share of positions with the same first
choice, seconds of analysis. The online Hadamard transform across heads of QuaRot is left out, as 9 heads have none.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch
from harness import Run, arguments
from rotations.published import CayleySgd, centred

import fuseline
from fuseline.models import metrics, text
from fuseline.models.spec import load
from fuseline.passes.rotation.learning import matrices

W4A4KV4 = "quantize{weights=int4:sym:mse,activations=int4:token:asym,keys=int4:asym,values=int4:asym}"
COLUMNS = ("name", "perplexity", "log_over", "kl", "top1", "seeds_perplexity", "seeds_kl", "seconds")
ROWS: dict[str, tuple[str, bool]] = {
    # name: (rotate's options, published)
    "plain": ("", False),
    "published hadamard": ("r1,r2,r3,r4,kind=random-hadamard,untie", True),
    "ours hadamard": ("r1,r2,r3,r4,kind=random-hadamard", False),
    "ours hadamard, no signs": ("r1,r2,r3,r4", False),
    "published learned": ("r1,r2,r3,r4,kind=learned,untie,loss=next-token,rate=1.5", True),
    "ours learned": ("r1,r2,r3,r4,kind=learned", False),
    "ours chosen": ("r1,r2,r3,r4,choose", False),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="windows of calibration text a step")
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="*", default=[], help="other rates for `ours learned`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    parser.add_argument("--quantize", default=W4A4KV4)
    return parser.parse_args(words)


class Benchmark:
    """One model and its texts, in float32."""

    def __init__(self, options: argparse.Namespace):
        loaded = load(options.model)
        self.options, self.device = options, torch.device(options.device)
        self.original = loaded.model.eval().requires_grad_(False).to(self.device)
        count = options.batch * options.batches
        calibration = text.windows(text.calibration_text(), loaded.encode, options.length, count)
        batches = torch.cat(calibration).split(options.batch)
        self.calibration = [self.inputs(b) for b in batches if len(b) == options.batch]
        self.texts = text.windows(text.evaluation_text(), loaded.encode, options.length, options.windows)

    def inputs(self, ids: torch.Tensor) -> dict[str, Any]:
        return {"input_ids": ids.to(self.device), "use_cache": False}

    @torch.no_grad()
    def measured(self, pipeline: str, published: bool) -> dict[str, float]:
        """Figures of the model after a pipeline."""
        model = centred(self.original) if published else self.original
        passes = fuseline.Pipeline(pipeline)
        plan, seconds = None, 0.0
        if passes.needs_data:
            began = time.monotonic()
            optimizer = CayleySgd if published else matrices.Cayley
            with mock.patch.object(matrices, "Cayley", optimizer):
                plan = fuseline.analyze(model, passes, self.calibration)
            seconds = time.monotonic() - began
        program = fuseline.capture(model, (), self.inputs(self.texts[0]))
        after, _ = passes.run(program, plan=plan, verification="off")
        module = after.to_module()
        found = metrics.compare(self.logits(self.original), self.logits(module), self.texts)
        row = {
            "perplexity": found.perplexity_after, "original": found.perplexity_before, "kl": found.kl,
            "log_over": math.log(found.perplexity_after / found.perplexity_before), "top1": found.top1,
            "seconds": seconds,
        }  # fmt: skip
        if plan is not None:
            row["decided"] = plan.sites[""]["rotate"].structure
        return row

    def logits(self, model: torch.nn.Module) -> metrics.Logits:
        @torch.no_grad()
        def call(ids: torch.Tensor) -> torch.Tensor:
            return model(**self.inputs(ids)).logits

        return call


def pipelines(rotation: str, options: argparse.Namespace) -> list[str]:
    """One a seed; one alone where nothing is drawn."""
    if not rotation:
        return [f"raise,{options.quantize}"]
    rotation = rotation.replace("kind=learned", f"kind=learned,steps={options.steps}")
    seeds = range(options.seeds) if "kind" in rotation else [0]
    return [f"raise,rotate{{{rotation},seed={seed}}},{options.quantize}" for seed in seeds]


@functools.cache
def benchmark(words: tuple[str, ...]) -> Benchmark:
    """A process's own."""
    return Benchmark(parse(list(words)))


def measured(words: tuple[str, ...], pipeline: str, published: bool) -> dict[str, Any]:
    return benchmark(words).measured(pipeline, published)


def fill(row: dict[str, Any], runs: list[Future[dict[str, Any]]]) -> None:
    """Medians over seeds, and the figures of each seed."""
    row["runs"] = [run.result() for run in runs]
    for figure in ("perplexity", "log_over", "kl", "top1", "seconds"):
        row[figure] = statistics.median(run[figure] for run in row["runs"])
    for figure in ("perplexity", "kl"):
        row[f"seeds_{figure}"] = " ".join(f"{run[figure]:.4g}" for run in row["runs"])


def main() -> None:
    options = parse()
    rows = dict(ROWS)
    for rate in options.rates:
        rows[f"ours learned, rate {rate:g}"] = (f"r1,r2,r3,r4,kind=learned,rate={rate:g}", False)
    run = Run("rotation", options, floors=False)
    run.check(rows)
    words = tuple(sys.argv[1:])
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        runs = {
            name: [pool.submit(measured, words, pipeline, published) for pipeline in pipelines(rotation, options)]
            for name, (rotation, published) in reversed(rows.items())  # the long ones first
            if options.only is None or name in options.only
        }
        for name in rows:
            run.measure(name, lambda row, name=name: fill(row, runs[name]))
    run.table(COLUMNS, f"{options.model}, {options.quantize}")


if __name__ == "__main__":
    main()
