"""A language model on a GPU through the public front door: tokens, KL, launched kernels, milliseconds a token.

    python benchmarks/language_model.py --model demo:smollm2

Every candidate runs in this one process on the same prompts: PyTorch eager, Fuseline's pipelines, and with `--peers`
torch.compile (Inductor). Times are medians over the tokens of one greedy decode after a warm-up decode of the same
length; each token is waited for, as a user who streams them does.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Run, Timing, arguments, launched, synchronize

import fuseline
from fuseline.models import metrics, text
from fuseline.models.spec import load

PROMPT = "The history of the steam engine began when"
PIPELINES = (
    "raise,fuse",
    "raise,quantize{weights=int8},fuse",
    "raise,quantize{weights=int4:g64},fuse",
)
COLUMNS = (
    "name", "ms_per_token", "kl", "top1", "tokens_equal_to_eager", "tokens", "our_kernels_launched",
    "other_kernels_launched", "first_decode_s",
)  # fmt: skip


def decode(model: Any, ids: torch.Tensor, count: int, cache: str | None) -> tuple[list[int], Timing]:
    """Greedy tokens and the seconds of each step after the first."""
    stamps: list[float] = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            synchronize(value.device)
            stamps.append(time.perf_counter())

        def end(self) -> None: ...

    output = model.generate(
        ids,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        cache_implementation=cache,
        streamer=Clock(),
        disable_compile=True,  # generate() would compile the static cache's decode steps by itself
    )
    steps = tuple(b - a for a, b in zip(stamps[2:], stamps[3:], strict=False))
    return output[0, ids.shape[1] :].tolist(), Timing(steps)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--cache", default="static", choices=("static", "dynamic"))
    parser.add_argument("--target", default=None)
    parser.add_argument("--peers", action="store_true", help="also time torch.compile")
    parser.add_argument("--pipeline", action="append")
    return parser.parse_args(words)


class Benchmark:
    """One model and its prompts; eager's tokens are the reference, and those of float32 on the CPU."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        loaded = load(options.model, getattr(torch, options.dtype)).to(options.device)
        self.original: Any = loaded.model.eval()
        self.ids = torch.tensor([loaded.encode(PROMPT)], device=options.device)
        self.texts = text.windows(text.evaluation_text(), loaded.encode, options.length, options.windows)
        self.exact = self.tokens(copy.deepcopy(self.original).cpu().float(), self.ids.cpu())
        self.eager = self.tokens(self.original, self.ids)

    def decode(self, model: Any, ids: torch.Tensor, count: int) -> tuple[list[int], Timing]:
        return decode(model, ids, count, "static" if self.options.cache == "static" else None)

    def tokens(self, model: Any, ids: torch.Tensor) -> list[int]:
        return self.decode(model, ids, self.options.tokens)[0]

    def logits(self, model: Any) -> metrics.Logits:
        @torch.no_grad()
        def call(batch: torch.Tensor) -> torch.Tensor:
            return model(batch.to(self.device), use_cache=False).logits.float().cpu()

        return call

    def candidates(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield "eager", lambda: self.original
        for pipeline in self.options.pipeline or PIPELINES:
            yield (
                pipeline,
                lambda pipeline=pipeline: fuseline.optimize(
                    copy.deepcopy(self.original), pipeline, target=self.options.target
                ),
            )
        for mode in ("default", "reduce-overhead") if self.options.peers else ():

            def peer(mode: str = mode) -> Any:
                model = copy.deepcopy(self.original)
                model.compile(mode=mode)
                return model

            yield f"torch.compile {mode}", peer

    def fill(self, row: dict[str, Any], make: Callable[[], Any]) -> None:
        model, ids, count = make(), self.ids, self.options.tokens
        started = time.perf_counter()
        tokens = self.tokens(model, ids)
        row["first_decode_s"] = time.perf_counter() - started
        _, steps = self.decode(model, ids, count)
        row |= steps.row("ms_per_token", 1e3)
        equal = lambda reference: sum(a == b for a, b in zip(tokens, reference, strict=True))
        row |= {
            "tokens_equal_to_eager": equal(self.eager),
            "tokens_equal_to_cpu_float32": equal(self.exact),
            "tokens": len(tokens),
            "token_ids": tokens,
        }
        kernels = launched(lambda: self.decode(model, ids, 4))
        compared = metrics.compare(self.logits(self.original), self.logits(model), self.texts)
        row |= {"kl": compared.kl, "top1": compared.top1, "perplexity": compared.perplexity_after}
        optimized = model is not self.original and not row["name"].startswith("torch.compile")
        compilations = fuseline.reports(model) if optimized else []
        ours = {kernel.name for compilation in compilations for kernel in compilation.kernels}
        row |= {
            "graphs": len(compilations),
            "our_kernels_launched": sum(int(entry["count"]) for name, entry in kernels.items() if name in ours),
            "our_kernels": sorted(set(kernels) & ours),
            "other_kernels_launched": sum(int(entry["count"]) for name, entry in kernels.items() if name not in ours),
            "through_pytorch": sorted({r for c in compilations for r in c.refusals.values()}),
        }


def main() -> None:
    options = parse()
    run = Run(options.model.rpartition(":")[2].replace("/", "-"), options)
    benchmark = Benchmark(options)
    chosen = dict(benchmark.candidates())
    run.check(chosen)
    for name, make in chosen.items():
        row = run.measure(name, lambda row, make=make: benchmark.fill(row, make))
        for cause in (row or {}).get("through_pytorch", ()):
            run.console.print(f"    through PyTorch: {cause}", highlight=False, markup=False)
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
