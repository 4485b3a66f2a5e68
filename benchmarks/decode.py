"""Decoding with a static cache: milliseconds a token and tokens a second beside the floor of the bytes to read.

    python benchmarks/decode.py                                   every candidate at the Llama-3-8B shape, one GPU
    python benchmarks/decode.py --only eager fuseline-int4        some of them
    python benchmarks/decode.py --resume                          what a run that was cut off did not measure
    python benchmarks/decode.py --fit                             with as many layers as a small GPU takes
    python benchmarks/decode.py --model-shape tiny --device cpu   tries it out, in a minute, without a GPU
    python benchmarks/decode.py --all                             all points of docs/benchmarks.md; --all --help

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

`--layers N` shortens the model. With `--per-layer` N/2 layers are measured first, and the row of N says what each layer
adds (`layer_ms`) and what the whole model would take by that (`full_ms`, beside `full_floor_ms`); the name says both.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from decoding.candidates import Prepare, Ready, candidates
from decoding.kernels import table, used
from decoding.layers import extrapolated, label
from decoding.loop import Loop
from decoding.model import SHAPES, State, build, cache_bytes, drawn, prompted
from decoding.options import decoding_arguments, fit, prompt_length
from harness import Run, Timing, launched, release, synchronize
from harness.run import reason
from harness.timing import paired
from torch.nn import functional as F

COLUMNS = (
    "name", "ms", "floor_ms", "to_floor", "full_ms", "host_us", "tokens_s", "decode_ms", "error", "kl", "argmax_equal",
    "tokens_equal", "compile_s",
)  # fmt: skip


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = decoding_arguments(__doc__)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of generate()'s prompt (default: 32)")
    parser.add_argument("--no-generate", action="store_true", help="time the step alone")
    parser.add_argument("--pipeline", action="append", help="a further row: Fuseline with this pipeline")
    parser.add_argument("--kernels", action="store_true", help="list the kernels of a step in the row")
    parser.add_argument(
        "--cache", choices=("prompt", "drawn"), default="prompt", help="keys and values of a prompt, or random ones"
    )
    parser.add_argument(
        "--per-layer", action="store_true", help="also half of --layers, and what the whole model would take"
    )
    parser.add_argument("--point", help="what the rows' names begin with")
    options = parser.parse_args(words)
    fit(options)
    if options.per_layer and (options.layers or 0) < 2:
        parser.error("--per-layer needs --layers, 2 or more")
    return options


class Benchmark:
    """Measures one candidate after another against the same eager reference."""

    def __init__(self, options: argparse.Namespace, run: Run, layers: int | None):
        self.options, self.run, self.layers = options, run, layers
        self.device, self.dtype = self.run.device, getattr(torch, options.dtype)
        self.state, self.logits, self.tokens = self.reference()
        release(self.device)

    def build(self) -> Any:
        return build(self.options.model_shape, self.layers, self.device, self.dtype)

    def reference(self) -> tuple[State, torch.Tensor, torch.Tensor]:
        """The state after the prompt, eager's first logits and its greedy tokens."""
        options, model = self.options, self.build()
        length = prompt_length(options)
        if options.cache == "drawn":
            state = drawn(model, options.batch, length, self.device)
        else:
            state = prompted(model, options.batch, length, options.cache_length, self.device)
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
        row |= {"bandwidth": self.run.rates["bandwidth"], "layers": ready.model.config.num_hidden_layers}
        if options.cache == "drawn":
            row["cache"] = "keys and values are drawn"
        if options.kernels:
            try:
                self.kernels(row, ready, loop)
            except Exception as error:  # the row's own figures are measured: they are kept
                row["kernels_failed"] = reason(error)

    @torch.no_grad()
    def kernels(self, row: dict[str, Any], ready: Ready, loop: Loop) -> None:
        """The kernels of the steps as they are replayed, and what those of ours read and write."""
        steps = min(self.options.steps, 8)
        loop.restart()
        row["launched"] = launched(lambda: [loop.step() for _ in range(steps)])
        compilation = ready.compiled()
        uses = used(compilation, self.state.length + steps // 2, self.options.cache_length) if compilation else {}
        row["kernel_table"] = table(row["launched"], uses, steps)

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
    total = SHAPES[options.model_shape]["num_hidden_layers"]
    counts = [options.layers // 2, options.layers] if options.per_layer else [options.layers]
    shown = [label(options.point, name, count, total) for count in counts for name in options.only or chosen]
    known = [label(options.point, name, count, total) for count in counts for name in chosen]
    prompt_length(options)
    asked, options.only = options.only, shown
    run = Run("decode", options)
    run.check(known)
    for count in counts:
        order = [name for name in (asked or chosen) if name in chosen]
        names = {label(options.point, name, count, total): name for name in order}
        if not any(run.wanted(name) and name not in {row["name"] for row in run.rows} for name in names):
            continue
        benchmark = Benchmark(options, run, count)
        run.console.print(f"{benchmark.state.length} of {options.cache_length} slots filled before the first step")
        for shown_as, name in names.items():
            run.measure(shown_as, lambda row, one=chosen[name], at=benchmark: at.fill(row, one))  # type: ignore[misc]
        del benchmark
        release(run.device)
    if options.per_layer:
        extrapolated(run.rows, options.point, list(chosen), counts, total)
        run.save()
    run.table(COLUMNS)


if __name__ == "__main__":
    if "--all" in sys.argv[1:]:
        from decoding.everything import main as everything

        sys.exit(everything([word for word in sys.argv[1:] if word != "--all"]))
    main()
