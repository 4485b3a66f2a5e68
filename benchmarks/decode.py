"""Decoding with a static cache: milliseconds a token and tokens a second beside the floor of the bytes to read.

    python benchmarks/decode.py                                   every candidate at the Llama-3-8B shape, one GPU
    python benchmarks/decode.py --only eager fuseline-int4        some of them
    python benchmarks/decode.py --resume                          what a run that was cut off did not measure
    python benchmarks/decode.py --fit                             with as many layers as a small GPU takes
    python benchmarks/decode.py --model-shape tiny --device cpu   tries it out, in a minute, without a GPU

transformers' unmodified model with random bfloat16 weights, drawn again from one seed for each candidate. All start
from the same keys and values after a prompt that nearly fills the cache, computed in eager. Columns:

ms            milliseconds a token of the decode step: median of repeats, the device's clock over `--steps` steps
floor_ms      bytes that a step must read (weights as stored, keys and values so far) over this run's bandwidth
to_floor      ms / floor_ms
host_us       microseconds that the host needs to issue a step, median
tokens_s      generate(), greedy: tokens a second, its prompt included
decode_ms     generate(), greedy: milliseconds of one more token (two lengths subtracted)
error, kl     the first step's logits beside eager's: max|Δ| / max|reference|, KL in nats; argmax_equal
tokens_equal  greedy tokens equal to eager's before the first that differs
compile_s     seconds of the first steps, in which the step is compiled
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from decoding.candidates import Prepare, Ready, candidates
from decoding.loop import Loop
from decoding.model import State, build, cache_bytes, prompted
from decoding.options import decoding_arguments, fit, prompt_length
from harness import Run, Timing, launched, release, synchronize
from harness.timing import paired
from torch.nn import functional as F

COLUMNS = (
    "name", "ms", "floor_ms", "to_floor", "host_us", "tokens_s", "decode_ms", "error", "kl", "argmax_equal",
    "tokens_equal", "compile_s",
)  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = decoding_arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of generate()'s prompt (default: 32)")
    parser.add_argument("--no-generate", action="store_true", help="time the step alone")
    parser.add_argument("--pipeline", action="append", help="a further row: Fuseline with this pipeline")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a step in the row")
    options = parser.parse_args(words)
    fit(options)
    return options


class Benchmark:
    """Measures one candidate after another against the same eager reference."""

    def __init__(self, options: argparse.Namespace, run: Run):
        self.options, self.run = options, run
        self.device, self.dtype = self.run.device, getattr(torch, options.dtype)
        self.state, self.logits, self.tokens = self.reference()
        release(self.device)

    def build(self) -> Any:
        return build(self.options.model_shape, self.options.layers, self.device, self.dtype)

    def reference(self) -> tuple[State, torch.Tensor, torch.Tensor]:
        """The state after the prompt, eager's first logits and its greedy tokens."""
        options, model = self.options, self.build()
        state = prompted(model, options.batch, prompt_length(options), options.cache_length, self.device)
        return state, *Loop(model, model, state, options.cache_length, options.inputs).tokens(options.steps)

    def fill(self, row: dict[str, Any], prepare: Prepare) -> None:
        """All figures of one candidate; each is in the row as soon as it is known."""
        began = time.perf_counter()
        ready = prepare(self.build())
        synchronize(self.device)
        row["prepare_s"] = time.perf_counter() - began
        self.step(row, ready)
        row |= ready.notes()
        self.run.save()
        if not self.options.no_generate and self.run.seconds_left() > 0:
            self.generate(row, ready)
            row |= ready.notes()

    def step(self, row: dict[str, Any], ready: Ready) -> None:
        options = self.options
        loop = Loop(ready.model, ready.call, self.state, options.cache_length, options.inputs)
        row["compile_s"] = loop.warm_up()
        logits, tokens = loop.tokens(options.steps)
        row |= compared(self.logits, logits) | {"tokens_equal": agreed(self.tokens, tokens), "tokens": tokens.shape[1]}
        decoded = loop.timed(options.steps, options.repeats)
        row |= decoded.step.row("ms", 1e3) | {"host_us": decoded.host.median * 1e6}
        length = self.state.length + options.steps / 2
        row["weight_bytes"] = ready.weights(options.batch)
        row["cache_bytes"] = cache_bytes(ready.model, options.batch, length)
        row["floor_ms"] = (row["weight_bytes"] + row["cache_bytes"]) / self.run.rates["bandwidth"] * 1e3
        row["to_floor"] = row["ms"] / row["floor_ms"]
        if options.kernels:
            with torch.no_grad():
                loop.restart()
                row["launched"] = launched(loop.step)

    @torch.no_grad()
    def generate(self, row: dict[str, Any], ready: Ready) -> None:
        """generate() with two lengths: whole, and what one more token takes."""
        options = self.options
        prompt = self.state.prompt[:, : options.prompt]
        prompt = prompt[:, : max(options.cache_length - 2 * options.steps, 1)]
        seconds: dict[int, list[float]] = {}
        short, long = options.steps // 2, options.steps * 3 // 2

        def run(count: int) -> float:
            began = time.perf_counter()
            ready.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=count,
                do_sample=False,
                cache_implementation="static",
                max_cache_len=options.cache_length,
                **ready.generation,
            )
            synchronize(self.device)
            return time.perf_counter() - began

        row["generate_compile_s"] = run(short)
        for _ in range(2):
            for count in (short, long):
                seconds.setdefault(count, []).append(run(count))
        whole = Timing(tuple(seconds[long]))
        row["tokens_s"] = options.batch * long / whole.median
        row |= paired(seconds[long], seconds[short], long - short).row("decode_ms", 1e3)
        row["generated"] = {"prompt": prompt.shape[1], "lengths": [short, long]}


def compared(reference: torch.Tensor, logits: torch.Tensor) -> dict[str, Any]:
    """Logits [batch, vocabulary] beside the reference's: error, KL(reference ‖ logits) in nats, argmax."""
    p, q = (F.log_softmax(x.double(), -1) for x in (reference, logits))
    return {
        "error": ((logits - reference).abs().max() / reference.abs().max()).item(),
        "kl": F.kl_div(q, p, reduction="batchmean", log_target=True).item(),
        "argmax_equal": bool((p.argmax(-1) == q.argmax(-1)).all()),
    }


def agreed(reference: torch.Tensor, tokens: torch.Tensor) -> int:
    """Tokens [batch, steps] that are equal before the first difference, in the batch's worst row."""
    return int((reference == tokens).long().cumprod(1).sum(1).min())


def main() -> None:
    options = parse()
    chosen = candidates(options.pipeline, options.target)
    prompt_length(options)
    run = Run("decode", options)
    run.check(chosen)
    benchmark = Benchmark(options, run)
    run.console.print(f"{benchmark.state.length} of {options.cache_length} slots filled before the first step")
    for name, prepare in chosen.items():
        run.measure(name, lambda row, prepare=prepare: benchmark.fill(row, prepare))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
