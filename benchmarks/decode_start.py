"""How long until a model decodes: a first process, whose caches are empty, and a second one, whose are not.

    python benchmarks/decode_start.py                                  the Llama-3-8B shape, ours and Inductor's
    python benchmarks/decode_start.py --layers 8 --only fuseline-int4  a short one, one candidate
    python benchmarks/decode_start.py --model-shape tiny --device cpu --target inductor     tries it out

Each row is a process of its own. Both processes of a candidate share one folder of caches (Fuseline's, Inductor's and
Triton's), new for the first. Seconds:

total_s     from the start of the process to the end of the eighth token
import_s    torch, transformers and this package
build_s     the model with its weights on the device, the cache, and what the candidate does ahead of the first call
compile_s   the eight tokens: compilation, warm-up and capture; the sum of the next three
capture_s   of that: Dynamo's, the model's own code traced to a graph and its guards
backend_s   of that: the compiler behind it, ours or Inductor's
calls_s     of that: the rest, eight calls with what is loaded, tuned or captured in them
ours_s      backend_s + calls_s where the compiler is ours: all that this package can answer for
"""

from __future__ import annotations

import time

BEGAN = time.time()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from decoding.candidates import candidates  # noqa: E402
from decoding.layers import label  # noqa: E402
from decoding.loop import Loop  # noqa: E402
from decoding.model import SHAPES, build, drawn  # noqa: E402
from decoding.options import decoding_arguments, fit, prompt_length  # noqa: E402
from harness import Run, synchronize  # noqa: E402
from torch._dynamo.utils import compilation_time_metrics  # noqa: E402

COLUMNS = ("name", "total_s", "import_s", "build_s", "compile_s", "capture_s", "backend_s", "calls_s", "ours_s")
CACHES = {"FUSELINE_CACHE": "fuseline", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
DEFAULT = ("fuseline-bf16", "reduce-overhead")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = decoding_arguments(__doc__)
    parser.add_argument("--one", metavar="NAME", help="what a row's process runs: prints its seconds as JSON")
    parser.add_argument("--began", type=float, help="… and when it was started, as time.time() says")
    options = parser.parse_args(words)
    fit(options)
    return options


def one(options: argparse.Namespace) -> dict[str, Any]:
    """One start, in this process."""
    began = options.began or BEGAN
    imported = time.time()
    device = torch.device(options.device)
    model = build(options.model_shape, options.layers, device, getattr(torch, options.dtype))
    state = drawn(model, options.batch, prompt_length(options), device)
    ready = candidates(target=options.target)[options.one](model)
    loop = Loop(ready.model, ready.call, state, options.cache_length, options.inputs)
    synchronize(device)
    built = time.time()
    seconds = loop.warm_up()
    total = time.time() - began
    spent = lambda name: sum(compilation_time_metrics.get(name, ()))
    whole, backend = spent("_compile.compile_inner"), spent("OutputGraph.call_user_compiler")
    row = {
        "total_s": total,
        "import_s": imported - began,
        "build_s": built - imported,
        "compile_s": seconds,
        "capture_s": whole - backend,
        "backend_s": backend,
        "calls_s": seconds - whole,
    }
    if ready.compiled() is not None:
        row["ours_s"] = seconds - row["capture_s"]
    return row | ready.notes()


def started(options: argparse.Namespace, name: str, folder: Path) -> dict[str, Any]:
    """One start in a process of its own, with its caches in `folder`; raises where it fails."""
    words = [word for key in ("device", "model_shape", "dtype", "batch", "cache_length", "steps", "inputs")
             for word in (f"--{key.replace('_', '-')}", str(getattr(options, key)))]  # fmt: skip
    words += ["--layers", str(options.layers)] if options.layers else []
    words += ["--target", options.target] if options.target else []
    environment = os.environ | {variable: str(folder / kind) for variable, kind in CACHES.items()}
    command = [sys.executable, str(Path(__file__).resolve()), "--one", name, "--began", repr(time.time()), *words]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["nothing said"])[-1]
        raise RuntimeError(f"exit code {process.returncode}: {last}")
    return json.loads(process.stdout.strip().splitlines()[-1])


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(one(options), default=str))
        return
    total = SHAPES[options.model_shape]["num_hidden_layers"]
    names = {label(None, name, options.layers, total): name for name in candidates(target=options.target)}
    wanted = [label(None, name, options.layers, total) for name in options.only or DEFAULT]
    options.only = [f"{name} {kind}" for name in wanted for kind in ("cold", "warm")]
    run = Run("decode-starts", options, floors=False)
    run.check([f"{name} {kind}" for name in names for kind in ("cold", "warm")])
    for shown in wanted:
        if all(any(row["name"] == f"{shown} {kind}" for row in run.rows) for kind in ("cold", "warm")):
            continue
        run.record["rows"] = [row for row in run.rows if row["name"] not in (f"{shown} cold", f"{shown} warm")]
        with tempfile.TemporaryDirectory(prefix="fuseline-start-") as folder:
            for kind in ("cold", "warm"):
                begin = lambda row, name=names[shown], at=folder: row.update(started(options, name, Path(at)))
                run.measure(f"{shown} {kind}", begin)  # type: ignore[arg-type]
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
