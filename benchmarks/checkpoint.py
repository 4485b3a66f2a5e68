"""Memory against time of training steps: our choices beside PyTorch's, full-block checkpointing, and AutoSP's rule.

    python benchmarks/checkpoint.py                          all points: a shape and a length each, one GPU
    python benchmarks/checkpoint.py --points 1b-32k          one of them, some minutes
    python benchmarks/checkpoint.py --longest                how far each of a few goes within some memory
    python benchmarks/checkpoint.py --small --device cpu     tries it out

Each row runs in a process of its own. All share the model, its attention (is_causal), and a loss that is computed in
chunks outside of the compiled graph, so that none stores logits; the step is forward, backward and SGD at batch 1.
Several processes compile at the length that is measured, their parameters without memory, and each waits before its
first step until the GPU is its own. With --longest the length is symbolic, and `half_s` is a step of half of --length;
with --exactly it is a number, and the row tells whether a step of so many tokens fits, compiled for them alone.
`peak_gb` is the allocator's, parameters and gradients included; `predicted_gb` what our pass said before the run;
`compile_s` counts processor time, as processes share the cores; `beaten_by` the other rows of the point with no more
memory and no more time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checkpoints.points import CANDIDATES, LONGEST, OURS, POINTS, Point, rows
from checkpoints.rule import partition_by_rule
from checkpoints.stack import CHUNK, ChunkedLoss, Weights
from checkpoints.turns import Turn
from harness import Run, arguments, synchronize

COLUMNS = ("name", "peak_gb", "step_ms", "predicted_gb", "off", "kept_gb", "compile_s", "beaten_by")
FAR = ("name", "longest", "peak_gb", "step_s", "half_s", "gb_per_1k", "compile_s")
STEP = 1024
GIVES_WAY = 10  # niceness of those that compile
SPARE = 5  # seconds of the budget that are left for what processes that are cut off leave
SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # else much of the memory is lost between blocks


def compile_backward_at_once() -> None:
    """PyTorch compiles a backward when it is first called: the GPU would wait for it."""
    from torch._functorch import config

    config.force_non_lazy_backward_lowering = True


def compiled(name: str, model: torch.nn.Module, settings: argparse.Namespace, record: list[Any], turn: Turn) -> Any:
    target = "inductor" if settings.device == "cuda" or settings.inductor else "eager"
    if name in OURS:
        import fuseline  # noqa: F401

        pipeline = OURS[name] + (f",target_seq={settings.length}}}" if settings.symbolic else "}")
        options = {"pipeline": pipeline, "target": target, "record": record.append}
        return torch.compile(model, backend=turn.before("fuseline", options=options))
    if name == "full-block eager":
        turn.start()
        return model
    if name.startswith("torch budget"):
        from torch._functorch import config as functorch_config

        functorch_config.activation_memory_budget = float(name.split()[-1])
    if name == "AutoSP's rule":
        partition_by_rule()
    plain = "inductor" if target == "inductor" else "aot_eager_decomp_partition"
    return torch.compile(model, backend=turn.before(plain))


def measured(settings: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    from fuseline.models.shapes import SHAPES

    name, at = settings.candidate, Point(**settings.at)
    shape = SHAPES[at.shape]
    shape = replace(shape, layers=at.layers or shape.layers)
    if settings.small:
        shape = replace(shape, hidden=64, inner=128, heads=4, kv_heads=2, layers=4, vocabulary=256)
    device = torch.device(settings.device)
    os.nice(GIVES_WAY)
    compile_backward_at_once()
    weights = Weights(shape, name.startswith("full-block"), device)
    record: list[Any] = []
    turn = Turn(settings.lock, settings.symbolic, weights.fill)
    run = compiled(name, weights.model, settings, record, turn)
    optimizer = torch.optim.SGD(weights.bytes, lr=1e-4, foreach=False)  # in place, one after another

    def step(length: int) -> float:
        ids = torch.randint(0, shape.vocabulary, (1, length + 1), device=device)
        inputs = ids[:, :-1].contiguous()
        if settings.symbolic:
            torch._dynamo.mark_dynamic(inputs, 1)
        optimizer.zero_grad()
        hidden = run(inputs)
        loss = ChunkedLoss.apply(hidden[0], weights.head, ids[0, 1:])
        del hidden
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    if settings.longest:
        row: dict[str, Any] = {}
        row["longest"] = (exactly if settings.exactly else furthest)(step, settings, row, turn)
        return row
    step(at.length)
    row = {"compile_s": time.process_time()}
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(at.repeats):
        synchronize(device)
        began = time.perf_counter()
        row["loss"] = step(at.length)
        synchronize(device)
        times.append((time.perf_counter() - began) * 1e3)
    row["step_ms"], row["times_ms"], row["layers"] = statistics.median(times), times, shape.layers
    if device.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if record and record[-1].joint is not None:
        row |= predicted(record[-1].joint.module.meta["checkpoint"], weights, at.length)
        if "peak_gb" in row:
            row["off"] = row["predicted_gb"] / row["peak_gb"] - 1
    return row


def predicted(said: dict[str, Any], weights: Weights, length: int) -> dict[str, Any]:
    """The peak of a step by what the pass said of the graph: parameters and the loss, which has a gradient of its
    head, are besides."""
    head = weights.head
    head_bytes, width = head.numel() * head.element_size(), head.element_size()
    held = sum(weights.bytes.values())
    hidden = length * head.shape[1] * width
    loss = said["kept"] + 2 * hidden + head_bytes + CHUNK * head.shape[0] * (4 + 4 + width)
    during = said["peak"] + hidden + head_bytes
    return {"predicted_gb": (held + max(during, loss)) / 1e9, "kept_gb": said["kept"] / 1e9, "said": said}


def furthest(step: Any, settings: argparse.Namespace, row: dict[str, Any], turn: Turn) -> int:
    """The longest length within `--memory`: from the peaks at the last two lengths, each at most three times the one
    before, and confirmed by a step of that length. It is compiled for all of them at a quarter of `--length`."""
    limit = limit_memory(settings)
    fits = partial(fitting, step, row)
    short = settings.length // 4
    if not fits(short):
        return 0
    row["compile_s"] = time.process_time()
    turn.take()
    if not fits(short) or not fits(2 * short) or not fits(2 * short):  # what goes to the host first makes room there
        return 0
    row["half_s"] = row["steps"][2 * short][0]
    reached, ceiling = 2 * short, 1 << 62
    for _ in range(5):
        (a, (_, first)), (b, (_, second)) = sorted(row["steps"].items())[-2:]
        grows = (second - first) / (b - a)  # short steps are at their fullest where the length does not count
        row["gb_per_1k"] = grows * 1024
        row["fitted"] = int(b + (limit / 1e9 - second) / grows)
        length = int(min(0.98 * row["fitted"], 3 * reached, 0.5 * (reached + ceiling))) // STEP * STEP
        if length <= reached * 1.04:
            break
        if fits(length):
            reached = length
        else:
            ceiling = length
    row["step_s"], row["peak_gb"] = row["steps"][reached]
    return reached


def exactly(step: Any, settings: argparse.Namespace, row: dict[str, Any], turn: Turn) -> int:
    """`--exactly`, if two steps of that many tokens fit in `--memory`; else 0."""
    limit_memory(settings)
    row["exactly"] = settings.exactly
    if not fitting(step, row, settings.exactly):
        return 0
    row["compile_s"] = time.process_time()
    if not fitting(step, row, settings.exactly):
        return 0
    row["step_s"], row["peak_gb"] = row["steps"][settings.exactly]
    return settings.exactly


def fitting(step: Any, row: dict[str, Any], length: int) -> bool:
    """Whether a step of that length fits: its seconds and its peak in GB are in the row's `steps` then."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        step(length)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        row["ended_by"] = "memory"
        return False
    row.setdefault("steps", {})[length] = [time.perf_counter() - began, torch.cuda.max_memory_allocated() / 1e9]
    print(json.dumps(row), flush=True)  # what a run that is cut off leaves
    return True


def limit_memory(settings: argparse.Namespace) -> float:
    """Lets this process have no more than `--memory`: in bytes."""
    limit = settings.memory * 1e9
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.get_device_properties(0).total_memory))
    return limit


def child(name: str, at: Point, settings: argparse.Namespace) -> dict[str, Any]:
    """One row, in a process of its own."""
    given = {k: v for k, v in vars(settings).items() if k != "json"} | {"candidate": name, "at": vars(at)}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--given", json.dumps(given, default=str)], capture_output=True, text=True,
            timeout=max(settings.deadline - time.time(), 1),
            env={"TORCHINDUCTOR_COMPILE_THREADS": "4", **SEGMENTS, **os.environ, "FUSELINE_REPRO": "off"},
        )  # fmt: skip
        printed, ended = done.stdout, "\n".join(done.stderr.strip().splitlines()[-8:])
        ended = ended or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as cut:
        printed, ended = (cut.stdout or b"").decode(), f"cut off after {cut.timeout:.0f} s"
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(ended)
    row = json.loads(lines[-1])
    if "longest" not in row and "step_ms" not in row:
        reached = max(map(int, row["steps"]))
        row |= {"longest": reached, "ended_by": ended, "peak_gb": row["steps"][str(reached)][1]}
    return row


def beaten(rows: list[dict[str, Any]]) -> None:
    """Names what is no worse than a row in both memory and time at the same point."""
    measured = [r for r in rows if "peak_gb" in r and "step_ms" in r]
    for row in measured:
        worse = [
            o.get("candidate", o["name"]) for o in measured
            if o is not row and o.get("point") == row.get("point")
            and o["peak_gb"] <= row["peak_gb"] and o["step_ms"] <= row["step_ms"]
        ]  # fmt: skip
        row["beaten_by"] = ", ".join(worse) or "-"


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--points", nargs="+", choices=POINTS, default=list(POINTS))
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, metavar="NAME", help="of all points")
    parser.add_argument("--longest", action="store_true")
    parser.add_argument("--shape", default="llama-3.2-1b", help="of --longest (default: llama-3.2-1b)")
    parser.add_argument("--length", type=int, default=32768, help="of --longest: half of it is tried first")
    parser.add_argument("--memory", type=float, default=24, help="of --longest: GB a process may use (default: 24)")
    parser.add_argument("--exactly", type=int, default=0, help="of --longest: try that length, and no other")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--at-a-time", type=int, default=7, help="processes that compile at the same time")
    parser.add_argument("--lock", help="a file: runs that name the same one take turns on the GPU")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try it out")
    parser.add_argument("--inductor", action="store_true", help="Inductor on the CPU too")
    parser.add_argument("--given", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    settings = parse()
    if settings.given:
        print(json.dumps(measured(argparse.Namespace(**json.loads(settings.given)))))
        return
    if settings.longest:
        far = Point("longest", settings.shape, settings.length)
        chosen = {name: (far, name) for name in settings.candidates or LONGEST}
    else:
        chosen = rows(settings.points, settings.candidates or list(CANDIDATES))
    changes: dict[str, Any] = {"layers": settings.layers} if settings.layers else {}
    if settings.small:
        settings.length, settings.at_a_time = min(settings.length, 256), 2
        changes["length"] = 256
    run = Run("checkpoint-longest" if settings.longest else "checkpoint", settings, floors=False)
    run.check(chosen)
    settings.symbolic = settings.longest and not settings.exactly
    settings.deadline = time.time() + run.seconds_left() - SPARE
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(settings.at_a_time) as pool:
        settings.lock = settings.lock or str(Path(folder) / "lock")
        pending = {
            pool.submit(child, candidate, replace(point, **changes), settings): name
            for name, (point, candidate) in chosen.items()
            if run.wanted(name)
        }
        for one in as_completed(pending):  # what is done is kept, whatever becomes of the others
            point, candidate = chosen[pending[one]]
            own = {"point": point.name, "candidate": candidate}
            run.measure(pending[one], lambda row, one=one, own=own: row.update(own | one.result()))
    run.rows.sort(key=lambda row: list(chosen).index(row["name"]) if row["name"] in chosen else len(chosen))
    beaten(run.rows)
    run.save()
    run.table(FAR if settings.longest else COLUMNS)


if __name__ == "__main__":
    main()
