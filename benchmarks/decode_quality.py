"""A trained model's decode step beside Inductor's: the same tokens as eager, KL to float64, milliseconds in turns.

    python benchmarks/decode_quality.py --dtype float32                      one GPU
    python benchmarks/decode_quality.py --dtype bfloat16
    python benchmarks/decode_quality.py --device cpu --target inductor       on a CPU, through Inductor

One row a dtype, in it eager, Inductor (`reduce-overhead`) and ours (`raise,fuse`) from the same prompt and cache:

ms, inductor_ms, eager_ms            milliseconds a token: medians of short rounds in turns, by the device's clock
to_inductor                          median over the rounds of ours / Inductor's; ratio_quartiles: of the same
tokens_equal, inductor_tokens_equal  greedy tokens equal to eager's before the first that differs, of `tokens`
kl, inductor_kl, eager_kl            KL in nats to the float64 model's distribution, mean over `forced` tokens of
                                     held-out text that the step is given one by one; top1: the same most likely token
compile_s, inductor_compile_s        seconds of the first eight steps
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from decoding.candidates import compiled, eager, ours
from decoding.loop import WARMUP, Loop
from decoding.model import State, after
from harness import Run, Timing, arguments
from torch.nn import functional as F

from fuseline.models import text
from fuseline.models.spec import load

COLUMNS = (
    "name", "ms", "inductor_ms", "eager_ms", "to_inductor", "tokens_equal", "inductor_tokens_equal", "tokens", "kl",
    "inductor_kl", "eager_kl",
)  # fmt: skip
PROMPT = 32  # tokens


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--tokens", type=int, default=64, help="greedy tokens (default: 64)")
    parser.add_argument("--forced", type=int, default=256, help="tokens of text that KL is measured on (default: 256)")
    parser.add_argument("--rounds", type=int, default=31, help="timed of each, in turns (default: 31)")
    parser.add_argument("--steps", type=int, default=8, help="of a round (default: 8)")
    parser.add_argument("--pipeline", default="raise,fuse")
    parser.add_argument("--target", help="Fuseline's target (default: auto)")
    parser.add_argument("--row", help="the row's name (default: the model and the dtype)")
    return parser.parse_args(words)


class Comparison:
    """The model in one dtype on one device, a window of held-out text, and float64's distributions on it."""

    def __init__(self, options: argparse.Namespace, device: torch.device):
        self.options, self.device = options, device
        loaded = load(options.model, getattr(torch, options.dtype))
        self.original: Any = loaded.model.eval().to(device)
        (ids,) = text.windows(text.evaluation_text(), loaded.encode, PROMPT + options.forced + 1, 1)
        self.ids = ids.to(device)
        self.capacity = PROMPT + max(options.forced, options.tokens + WARMUP) + 8
        self.state: State = after(self.original, self.ids[:, :PROMPT], self.capacity)
        exact: Any = copy.deepcopy(self.original).double()
        with torch.no_grad():
            logits = exact(self.ids[:, :-1], use_cache=False).logits[0, PROMPT:]
        self.exact = F.log_softmax(logits.double(), -1).cpu()

    def loop(self, prepare: Any) -> Loop:
        ready = prepare(copy.deepcopy(self.original))
        return Loop(ready.model, ready.call, self.state, self.capacity)

    def fill(self, row: dict[str, Any]) -> None:
        """All figures; each is in the row as soon as it is known."""
        options = self.options
        makers = {"eager_": eager, "inductor_": compiled("reduce-overhead"), "": ours(options.pipeline, options.target)}
        row |= {"tokens": options.tokens, "forced": options.forced, "pipeline": options.pipeline}
        loops: dict[str, Loop] = {}
        for prefix, prepare in makers.items():
            began = time.perf_counter()
            loops[prefix] = loop = self.loop(prepare)
            loop.warm_up()
            row[f"{prefix}compile_s"] = time.perf_counter() - began
            tokens = loop.tokens(options.tokens)[1]
            equal = (loops["eager_"].tokens(options.tokens)[1] == tokens).long().cumprod(1).sum(1)
            row[f"{prefix}tokens_equal"] = int(equal.min())
            row |= self.distance(loop, prefix)
        self.turns(row, loops)

    def distance(self, loop: Loop, prefix: str) -> dict[str, Any]:
        """KL(float64 ‖ the steps) over the window."""
        logits = loop.forced(self.ids[:, PROMPT:-1])[0]
        found = F.log_softmax(logits.double(), -1)
        kl = F.kl_div(found, self.exact, reduction="batchmean", log_target=True).item()
        top1 = (found.argmax(-1) == self.exact.argmax(-1)).double().mean().item()
        return {f"{prefix}kl": kl, f"{prefix}top1": top1}

    def turns(self, row: dict[str, Any], loops: dict[str, Loop]) -> None:
        """Rounds of each, one after the other, so that what else the machine does is shared."""
        seconds: dict[str, list[float]] = {prefix: [] for prefix in loops}
        for _ in range(self.options.rounds):
            for prefix, loop in loops.items():
                seconds[prefix].append(loop.timed(self.options.steps, 1).step.median)
        for prefix, found in seconds.items():
            row |= Timing(tuple(found)).row(f"{prefix}ms", 1e3)
        ratios = [a / b for a, b in zip(seconds[""], seconds["inductor_"], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        row |= {"to_inductor": quartiles[1], "ratio_quartiles": [quartiles[0], quartiles[2]]}


def main() -> None:
    options = parse()
    name = options.row or f"{options.model} {options.dtype}"
    options.only = [name]
    run = Run("decode-quality", options, floors=False)
    run.measure(name, lambda row: Comparison(options, run.device).fill(row))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
