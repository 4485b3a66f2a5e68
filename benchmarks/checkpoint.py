"""Memory against time of training steps: our choices beside PyTorch's, full-block checkpointing, and AutoSP's rule.

    python benchmarks/checkpoint.py                        one GPU, Llama-3.2-1B's shape at 32K tokens: some minutes
    python benchmarks/checkpoint.py --longest              how far each of a few goes within some memory
    python benchmarks/checkpoint.py --small --device cpu   tries it out

Each point runs in a process of its own. All share the model, its attention (is_causal), and a loss that is computed in
chunks outside of the compiled graph, so that no point stores logits; the step is forward and backward at batch 1.
Several processes compile at the length that is measured, and each waits before its first step until the GPU is its own;
with --longest the length is symbolic, and `half_s` is a step of half of --length. `peak_gb` is the allocator's,
parameters and gradients included; `predicted_gb` what our pass said before the run; `compile_s` counts processor time,
as processes share the cores; `beaten_by` the other points with no more memory and no more time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import Run, arguments, synchronize
from torch._dynamo import lookup_backend
from torch.utils.checkpoint import checkpoint

COLUMNS = ("name", "peak_gb", "step_ms", "predicted_gb", "off", "kept_gb", "compile_s", "beaten_by")
FAR = ("name", "longest", "peak_gb", "step_s", "half_s", "gb_per_1k", "compile_s")
SHARES = (0.15, 0.25, 0.35, 0.5, 0.65, 0.8)
TILED = "raise{allow_empty},tile{tiles=8},"
OURS = {
    "ours long-context": "checkpoint{policy=long-context",
    "ours full": "checkpoint{policy=full",
    "ours min-cut": "checkpoint{policy=min-cut",
    **{f"ours {share}": f"checkpoint{{policy=budget,memory={share}" for share in SHARES},
    "ours long-context, host": "checkpoint{policy=long-context,offload=cpu",
    "ours tiled long-context": TILED + "checkpoint{policy=long-context",
    "ours tiled full": TILED + "checkpoint{policy=full",
    "ours tiled full, host": TILED + "checkpoint{policy=full,offload=cpu",
}
THEIRS = ("torch", *(f"torch budget {b / 10}" for b in (1, 2, 3, 5, 7, 9)), "full-block eager", "full-block compiled",
          "AutoSP's rule")  # fmt: skip
LONGEST = ("full-block compiled", "ours full", "ours tiled long-context", "ours tiled full", "ours tiled full, host")
CHUNK = 1024
STEP = 1024
SEGMENTS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}  # else much of the memory is lost between blocks


class ChunkedLoss(torch.autograd.Function):
    """The mean cross entropy of hidden [S, H] through a head [V, H], CHUNK tokens at a time, gradients too."""

    @staticmethod
    def forward(ctx, hidden, head, targets):
        total = hidden.new_zeros((), dtype=torch.float32)
        by_hidden, by_head = torch.empty_like(hidden), torch.zeros_like(head)
        count = targets.numel()
        for h, t, g in zip(hidden.split(CHUNK), targets.split(CHUNK), by_hidden.split(CHUNK)):
            logits = (h @ head.t()).float()
            total += torch.nn.functional.cross_entropy(logits, t, reduction="sum") / count
            slope = torch.softmax(logits, -1, out=logits) if not logits.requires_grad else logits
            slope[torch.arange(len(t), device=t.device), t] -= 1
            slope = (slope / count).to(h.dtype)
            torch.mm(slope, head, out=g)
            by_head.addmm_(slope.t(), h)
        ctx.save_for_backward(by_hidden, by_head)
        return total

    @staticmethod
    def backward(ctx, grad):
        by_hidden, by_head = ctx.saved_tensors
        return by_hidden * grad, by_head * grad, None


def autosp_rule(joint: Any, inputs: Any, **given: Any) -> Any:
    """AutoSP's choice on the joint graph: attention's results, and what a product of the backward reads unless it is
    [*, 4096 or more, …]; all else is computed again."""
    from fuseline.compiler.compat_joint import split_by_tags, tag
    from fuseline.compiler.costs import is_attention
    from fuseline.compiler.joint import forward_nodes

    given.pop("compiler", None)
    forward = forward_nodes(joint)
    before = set(forward)
    for node in forward:
        value = node.meta.get("val")
        source = node.args[0] if node.target.__class__.__name__ == "builtin_function_or_method" else node
        kept = is_attention(node) or (getattr(source, "op", "") == "call_function" and is_attention(source))
        if isinstance(value, torch.Tensor):
            product = any(u not in before and "mm" in str(u.target) for u in node.users)
            long = value.dim() >= 2 and (isinstance(value.shape[1], torch.SymInt) or value.shape[1] >= 4096)
            kept = kept or (product and not long)
        elif not isinstance(value, (tuple, list)):
            continue
        tag(node, kept)
    return split_by_tags(joint, inputs, **given)


class Stack(torch.nn.Module):
    """The decoder's hidden states, each layer checkpointed where that is asked for."""

    def __init__(self, shape: Any, blocks: bool):
        super().__init__()
        from fuseline.models.shapes import Decoder

        self.decoder, self.blocks = Decoder(shape, loss=False), blocks

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        from fuseline.models.decoder import angles

        d = self.decoder
        x = d.embed(ids)
        cos, sin = angles(ids.shape[1], d.shape.hidden // d.shape.heads, x)
        for layer in d.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if self.blocks else layer(x, cos, sin)
        return d.norm(x)


class Turn:
    """The GPU for one process: taken once, when what was compiled is about to run for the first time. With `early` it
    is not waited for then: what runs first is short."""

    def __init__(self, path: str, early: bool):
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)  # until the process ends
        self.taken, self.early = False, early

    def take(self) -> None:
        if not self.taken:
            fcntl.flock(self.file, fcntl.LOCK_EX)
            self.taken = True

    def before(self, backend: str, **given: Any) -> Callable[..., Any]:
        """The backend, whose compiled graphs take the turn."""
        inner = lookup_backend(backend)

        def compile_first(module: Any, inputs: Any) -> Any:
            function = inner(module, inputs, **given)

            def run(*arguments: Any) -> Any:
                self.take()
                return function(*arguments)

            return function if self.early else run

        return compile_first


def compiled(name: str, model: torch.nn.Module, settings: argparse.Namespace, record: list[Any], turn: Turn) -> Any:
    target = "inductor" if settings.device == "cuda" or settings.inductor else "eager"
    if name in OURS:
        import fuseline  # noqa: F401

        pipeline = OURS[name] + (f",target_seq={settings.length}}}" if settings.longest else "}")
        options = {"pipeline": pipeline, "target": target, "record": record.append}
        return torch.compile(model, backend=turn.before("fuseline", options=options))
    if name == "full-block eager":
        turn.take()
        return model
    if name.startswith("torch budget"):
        from torch._functorch import config as functorch_config

        functorch_config.activation_memory_budget = float(name.split()[-1])
    if name == "AutoSP's rule":
        from torch._inductor import config
        from torch._inductor.custom_graph_pass import CustomPartitionerFn

        class Rule(CustomPartitionerFn):
            def __call__(self, gm, joint_inputs, **given):
                return autosp_rule(gm, joint_inputs, **given)

            def uuid(self):
                return "autosp"

        config.custom_partitioner_fn = Rule()
    plain = "inductor" if target == "inductor" else "aot_eager_decomp_partition"
    return torch.compile(model, backend=turn.before(plain))


def point(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """Measures one point in this process."""
    from fuseline.models.shapes import SHAPES

    shape = SHAPES[settings.shape]
    shape = replace(shape, layers=settings.layers or shape.layers)
    if settings.small:
        shape = replace(shape, hidden=64, inner=128, heads=4, kv_heads=2, layers=4, vocabulary=256)
    device = torch.device(settings.device)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        model = Stack(shape, name.startswith("full-block")).to(dtype)
    head = model.decoder.embed.weight if shape.tied else torch.nn.Parameter(
        torch.randn(shape.vocabulary, shape.hidden, dtype=dtype, device=device) / 50)  # fmt: skip
    record: list[Any] = []
    turn = Turn(settings.lock, settings.longest)
    run = compiled(name, model, settings, record, turn)

    def step(length: int) -> float:
        ids = torch.randint(0, shape.vocabulary, (1, length + 1), device=device)
        inputs = ids[:, :-1].contiguous()
        if settings.longest:
            torch._dynamo.mark_dynamic(inputs, 1)
        hidden = run(inputs)
        loss = ChunkedLoss.apply(hidden[0], head, ids[0, 1:])
        del hidden
        loss.backward()
        return float(loss.detach())

    row: dict[str, Any] = {"name": name}
    if settings.longest:
        row["longest"] = furthest(step, settings, row, turn)
        return row
    step(settings.length)
    row["compile_s"] = time.process_time()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(settings.repeats):
        synchronize(device)
        began = time.perf_counter()
        row["loss"] = step(settings.length)
        synchronize(device)
        times.append((time.perf_counter() - began) * 1e3)
    row["step_ms"], row["times_ms"] = statistics.median(times), times
    if device.type == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if record and record[-1].joint is not None:
        said = record[-1].joint.module.meta["checkpoint"]
        owned = {p.data_ptr(): p.numel() * p.element_size() for p in [*model.parameters(), head]}
        # gradients of the step before are there until the optimizer has them; the loss holds its own besides
        held_bytes = 2 * sum(owned.values())
        hidden_bytes = settings.length * shape.hidden * head.element_size()
        loss_bytes = said["kept"] + 2 * hidden_bytes + head.numel() * head.element_size()
        loss_bytes += CHUNK * shape.vocabulary * (4 + 4 + head.element_size())
        during = said["peak"] + hidden_bytes + head.numel() * head.element_size()
        row["predicted_gb"] = (held_bytes + max(during, loss_bytes)) / 1e9
        row["kept_gb"], row["said"] = said["kept"] / 1e9, said
        if "peak_gb" in row:
            row["off"] = row["predicted_gb"] / row["peak_gb"] - 1
    return row


def furthest(step: Any, settings: argparse.Namespace, row: dict[str, Any], turn: Turn) -> int:
    """The longest length within `--memory`: from the peaks at the last two lengths, each at most twice the one before,
    and confirmed by a step of that length. It is compiled for all of them at a quarter of `--length`."""
    total = torch.cuda.get_device_properties(0).total_memory
    limit = settings.memory * 1e9
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    row["steps"] = {}

    def fits(length: int) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            step(length)
            torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            row["ended_by"] = "memory"
            return False
        row["steps"][length] = [time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9]
        return True

    short = settings.length // 4
    if not fits(short):
        return 0
    row["compile_s"] = time.process_time()
    turn.take()
    if not fits(short) or not fits(2 * short) or not fits(2 * short):  # what goes to the host first makes room there
        return 0
    row["half_s"] = row["steps"][2 * short][0]
    reached, ceiling = 2 * short, 1 << 62
    for _ in range(7):
        (a, (_, first)), (b, (_, second)) = sorted(row["steps"].items())[-2:]
        grows = (second - first) / (b - a)  # short steps are at their fullest where the length does not count
        row["gb_per_1k"] = grows * 1024
        row["fitted"] = int(b + (limit / 1e9 - second) / grows)
        length = int(min(0.99 * row["fitted"], 2 * reached, 0.5 * (reached + ceiling))) // STEP * STEP
        if length <= reached * 1.02:
            break
        if fits(length):
            reached = length
        else:
            ceiling = length
    row["step_s"], row["peak_gb"] = row["steps"][reached]
    return reached


def child(name: str, settings: argparse.Namespace) -> dict[str, Any]:
    """One point, in a process of its own."""
    given = json.dumps({**{k: v for k, v in vars(settings).items() if k != "json"}, "point": name}, default=str)
    done = subprocess.run(
        [sys.executable, __file__, "--given", given], capture_output=True, text=True,
        timeout=max(settings.budget, 60),
        env={"TORCHINDUCTOR_COMPILE_THREADS": "4", **SEGMENTS, **os.environ, "FUSELINE_REPRO": "off"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-8:]) or f"exit code {done.returncode}")
    return json.loads(lines[-1])


def beaten(rows: list[dict[str, Any]]) -> None:
    """Names the points that are no worse than a row in both memory and time."""
    measured = [r for r in rows if "peak_gb" in r and "step_ms" in r]
    for row in measured:
        worse = [
            o["name"] for o in measured
            if o is not row and o["peak_gb"] <= row["peak_gb"] and o["step_ms"] <= row["step_ms"]
        ]  # fmt: skip
        row["beaten_by"] = ", ".join(worse) or "-"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", default="llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the shape has")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--at-a-time", type=int, default=7, help="processes that compile at the same time")
    parser.add_argument("--longest", action="store_true")
    parser.add_argument(
        "--memory", type=float, default=24, help="of --longest: GB that a process may use (default: 24)"
    )
    parser.add_argument("--small", action="store_true", help="a tiny model, to try it out")
    parser.add_argument("--inductor", action="store_true", help="Inductor on the CPU too")
    parser.add_argument("--given", help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.given:
        given = argparse.Namespace(**json.loads(settings.given))
        print(json.dumps(point(given.point, given)))
        return
    if settings.small:
        settings.length, settings.at_a_time = min(settings.length, 256), 2
    names = LONGEST if settings.longest else (*OURS, *THEIRS)
    run = Run("checkpoint-longest" if settings.longest else "checkpoint", settings, floors=False)
    run.check(names)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(settings.at_a_time) as pool:
        settings.lock = str(Path(folder) / "lock")
        pending = {pool.submit(child, name, settings): name for name in names if run.wanted(name)}
        for one in as_completed(pending):  # what is done is kept, whatever becomes of the others
            run.measure(pending[one], lambda row, one=one: row.update(one.result()))
    run.rows.sort(key=lambda row: names.index(row["name"]))
    beaten(run.rows)
    run.save()
    run.table(FAR if settings.longest else COLUMNS)


if __name__ == "__main__":
    main()
