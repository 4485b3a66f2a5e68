"""Caches of codes: what they cost in accuracy on a CPU, and what reading them costs in time on a GPU.

    python benchmarks/kv.py                      on a GPU: the decode step at the Llama-3-8B shape, 32768 tokens
    python benchmarks/kv.py --sweep              the same, other warps, stages and numbers of programs tried
    python benchmarks/kv.py --part quality --device cpu --budget 7200 --json benchmarks/results/DATE-cpu-kv.json
                                                 perplexity of SmolLM2 and of a multi-head model, by setting
    python benchmarks/kv.py --part speed --device cpu --dtype float16 --tokens 300 --batches 1 --replays 1
                                                 tries the kernels out (TRITON_INTERPRET=1)

Columns of `speed`: microseconds of a step (median of CUDA-graph replays over rotating caches), bytes that it reads over
those of bfloat16 (`ratio`), gigabytes a second and their `share` of this run's bandwidth, the fastest of PyTorch's
attentions over as many keys and values in bfloat16, how many times longer that takes (`speedup`), the error over the
naive twin's result in float32. `own_us` is the template's own choice, `us` the best tuning. Rows `bf16`: PyTorch's
attentions themselves, `own_us` this package's. Rows `write`: one new token into keys and values; `block_us` where it
completes a block.

Columns of `quality`: bytes of coded keys and values over those of bfloat16 (`ratio`), the same of a cache of one
window's tokens with its ring (`held`), log-perplexity in nats a token and what it is above that of a bfloat16 cache
(`cost`), KL in nats. Every query sees what it would find in the cache at its step. `tada`: the bits of each layer's
keys and values are searched on calibration text.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from caching.kernel import Shape, plain, read, written
from caching.rows import quality
from harness import Run, arguments

SPEED = ("name", "us", "own_us", "ratio", "gb_s", "share", "sdpa_us", "speedup", "error", "tuning", "block_us")
QUALITY = ("name", "ratio", "held", "loss", "cost", "kl", "seconds")
SWEPT = ("KV4 g64", "KV4 g64 by head")
CACHES = {
    "KV4 g64": ("int4:channel:g64", "int4:token:g64", 128),
    "KV4 g64 by head": ("int4:channel:g64", "int4:token", 128),
    "KV4 kivi": ("int4:channel:g32", "int4:token:g32", 128),
    "KV4 by token": ("int4:token", "int4:token", 128),
    "KV2 minikv": ("int2:channel:g16", "int2:token:g16", 128),
    "KV8": ("int8:channel:g64", "int8:token", 128),
    "KV8 fp8": ("fp8:token", "fp8:token", 128),
}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--part", choices=("speed", "quality"), default="speed")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help=f"other tunings of {' and '.join(SWEPT)}")
    parser.add_argument("--models", nargs="+", default=["demo:smollm2", "multi-head"])
    parser.add_argument("--length", type=int, default=1024, help="quality: tokens of a window")
    parser.add_argument("--windows", type=int, default=2, help="quality: windows of held-out text")
    parser.add_argument("--trials", type=int, default=12, help="quality: exchanges that the search of bits tries")
    parser.add_argument("--train", type=float, default=400, help="quality: seconds to train the multi-head model")
    return parser.parse_args(words)


def speed(run: Run) -> None:
    options: Any = run.options
    with tempfile.TemporaryDirectory(prefix="fuseline-bench-") as folder:
        for batch in options.batches:
            run.measure(f"bf16 x{batch}", lambda row, b=batch: plain(row, Shape(b, options.tokens), run, Path(folder)))  # type: ignore[misc]
        for name, (keys, values, block) in CACHES.items():
            for batch in options.batches:
                shape = Shape(batch, options.tokens)
                for masked in (False, True) if name == "KV4 g64" else (False,):
                    run.measure(
                        f"{name} x{batch}{' masked' if masked else ''}",
                        lambda row, s=shape, k=keys, v=values, b=block, m=masked, t=name in SWEPT: read(  # type: ignore[misc]
                            row, s, k, v, b, m, t and not m and options.sweep, run, Path(folder)
                        ),
                    )
        keys, values, block = CACHES["KV4 g64"]
        for batch in options.batches:
            run.measure(
                f"write x{batch}",
                lambda row, b=batch: written(row, Shape(b, options.tokens), keys, values, block, run, Path(folder)),  # type: ignore[misc]
            )
    run.table(SPEED)


@torch.no_grad()
def main(words: list[str] | None = None) -> None:
    options = parse(words)
    run = Run("kv" if options.part == "speed" else "kv-quality", options, floors=options.part == "speed")
    if options.part == "speed":
        speed(run)
    else:
        quality(run)
        run.table(QUALITY)


if __name__ == "__main__":
    main()
