"""A language model on a GPU through the public front door: tokens, KL, launched kernels, milliseconds a token.

    python benchmarks/language_model.py --model demo:smollm2 --json benchmarks/results/DATE-GPU-smollm2.json

Every candidate runs in this one process on the same prompts: PyTorch eager, torch.compile (Inductor) and Fuseline's
pipelines. Times are medians over the tokens of one greedy decode after a warm-up decode of the same length.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fuseline
from fuseline.models import metrics, text
from fuseline.models.spec import load

PROMPT = "The history of the steam engine began when"
PIPELINES = (
    "raise,fuse",
    "raise,quantize{weights=int8},fuse",
    "raise,quantize{weights=int4:g64},fuse",
)


def decode(model: torch.nn.Module, ids: torch.Tensor, count: int, cache: str | None) -> tuple[list[int], list[float]]:
    """Greedy tokens and the milliseconds of each step after the first."""
    stamps: list[float] = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            if value.device.type == "cuda":
                torch.cuda.synchronize()
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
    steps = [(b - a) * 1e3 for a, b in zip(stamps[2:], stamps[3:], strict=False)]
    return output[0, ids.shape[1] :].tolist(), steps


def launched(function: Callable[[], Any]) -> dict[str, int]:
    """Kernels that really ran on the GPU, by name, from the profiler."""
    if not torch.cuda.is_available():
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    counts: dict[str, int] = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name] = counts.get(event.name, 0) + 1
    return counts


def environment() -> dict[str, Any]:
    """Device, driver, versions and commit, for the record."""
    import transformers
    import triton

    def ask(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu,
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "commit": ask("git", "rev-parse", "--short", "HEAD"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--cache", default="static", choices=("static", "dynamic"))
    parser.add_argument("--target", default=None)
    parser.add_argument("--peers", action="store_true", help="also time torch.compile")
    parser.add_argument("--pipeline", action="append")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cache = "static" if options.cache == "static" else None

    loaded = load(options.model, getattr(torch, options.dtype)).to(options.device)
    original = loaded.model.eval()
    ids = torch.tensor([loaded.encode(PROMPT)], device=options.device)
    texts = text.windows(text.evaluation_text(), loaded.encode, options.length, options.windows)
    wide = copy.deepcopy(original).cpu().float()
    reference_tokens, _ = decode(wide, ids.cpu(), options.tokens, cache)

    def logits(model: torch.nn.Module) -> metrics.Logits:
        @torch.no_grad()
        def call(batch: torch.Tensor) -> torch.Tensor:
            return model(batch.to(options.device), use_cache=False).logits.float().cpu()

        return call

    def candidates() -> Any:
        yield "eager", lambda: original
        for pipeline in options.pipeline or PIPELINES:
            yield (
                pipeline,
                lambda pipeline=pipeline: fuseline.optimize(copy.deepcopy(original), pipeline, target=options.target),
            )
        if options.peers:
            for mode in ("default", "reduce-overhead"):

                def peer(mode: str = mode) -> torch.nn.Module:
                    model = copy.deepcopy(original)
                    model.compile(mode=mode)
                    return model

                yield f"torch.compile {mode}", peer

    eager_tokens: list[int] = []
    rows: list[dict[str, Any]] = []
    record = {"environment": environment(), "command": vars(options) | {"json": str(options.json)}, "rows": rows}

    def measure(name: str, make: Callable[[], torch.nn.Module]) -> None:
        nonlocal eager_tokens
        torch.compiler.reset()
        model = make()
        started = time.perf_counter()
        tokens, _ = decode(model, ids, options.tokens, cache)
        compile_seconds = time.perf_counter() - started
        if name == "eager":
            eager_tokens = tokens
        _, steps = decode(model, ids, options.tokens, cache)
        kernels = launched(lambda model=model: decode(model, ids, 4, cache))
        compilations = fuseline.reports(model) if "torch" not in name and name != "eager" else []
        ours = {k.name for c in compilations for k in c.kernels}
        compared = metrics.compare(logits(original), logits(model), texts)
        rows.append(
            {
                "name": name,
                "first_decode_s": compile_seconds,
                "ms_per_token": statistics.median(steps),
                "ms_spread": [min(steps), max(steps)],
                "tokens_equal_to_eager": sum(a == b for a, b in zip(tokens, eager_tokens, strict=True)),
                "tokens_equal_to_cpu_float32": sum(a == b for a, b in zip(tokens, reference_tokens, strict=True)),
                "tokens": len(tokens),
                "token_ids": tokens,
                "kl": compared.kl,
                "top1": compared.top1,
                "perplexity": compared.perplexity_after,
                "graphs": len(compilations),
                "our_kernels_launched": sum(count for kernel, count in kernels.items() if kernel in ours),
                "our_kernels": sorted(set(kernels) & ours),
                "other_kernels_launched": sum(count for kernel, count in kernels.items() if kernel not in ours),
                "through_pytorch": sorted({r for c in compilations for r in c.refusals.values()}),
            }
        )
        row = rows[-1]
        print(
            f"{name:42} {row['ms_per_token']:8.3f} ms  kl {row['kl']:.2e}  top-1 {row['top1']:.3f}  "
            f"tokens {row['tokens_equal_to_eager']}/{row['tokens']}  ours {row['our_kernels_launched']}  "
            f"others {row['other_kernels_launched']}  first {row['first_decode_s']:.1f} s",
            flush=True,
        )
        for reason in row["through_pytorch"]:
            print(f"    through PyTorch: {reason}")

    for name, make in candidates():
        try:
            measure(name, make)
        except Exception as error:  # a peer that fails is a finding, and the other rows are kept
            rows.append({"name": name, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"})
            print(f"{name:42} failed: {rows[-1]['failed']}", flush=True)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1, default=str))


if __name__ == "__main__":
    main()
