"""Training on long sequences over several GPUs: Fuseline's `sequence-parallel` beside what one writes by hand.

    python benchmarks/sequence_parallel.py                                 two GPUs, 8K, 32K, 128K (about 6 minutes)
    python benchmarks/sequence_parallel.py --checkpointing                 peers recompute each layer
    python benchmarks/sequence_parallel.py --pipeline "raise,sequence-parallel,…" --only fuseline
    python benchmarks/sequence_parallel.py --device cpu --shape tiny --dtype float32 --lengths 32 64 --target eager
                                                                           tries it out

Llama-3.2-1B's shape with random weights, batch 1, forward, backward and AdamW, sharded by FSDP2 in every method:
`fuseline` and `fuseline-ring` (`kind=ring`); `fsdp` (a whole sequence on each rank); `ulysses` (all-to-alls by hand
around PyTorch's attention); `ring` (PyTorch's `context_parallel`); `alst` (ulysses with MLPs and loss in tiles). Each
method runs in processes of its own, so one that runs out of memory ends alone; it goes from the shortest length up and
stops where one does not fit.
Columns: tokens of all ranks in a second, seconds a step, peak memory of the fullest rank, the first loss (every method
but fsdp sees the same tokens, and all start from the same weights, so losses agree to the type's rounding).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from harness import Run, arguments
from sequences.methods import METHODS
from sequences.worker import options as passed_on

WORKER = Path(__file__).resolve().parent / "sequences" / "worker.py"
COLUMNS = ("name", "tokens_s", "step_s", "peak_gb", "loss", "warm_s")


def launch(method: str, chosen: argparse.Namespace, seconds: float) -> dict[int, dict[str, Any]]:
    """Runs a method's processes; what they measured, by length."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={chosen.ranks}",
                 str(WORKER), "--method", method, "--out", str(out)]  # fmt: skip
        for action in passed_on()._actions:
            value = getattr(chosen, action.dest, None)
            if action.dest == "help" or value in (None, False):
                continue
            words.append(f"--{action.dest}")
            words += [] if value is True else [str(v) for v in (value if isinstance(value, list) else [value])]
        environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        environment.setdefault("OMP_NUM_THREADS", "1")
        process = subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        try:
            printed = process.communicate(timeout=seconds)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            printed = f"{process.communicate()[0]}\nended after {seconds:.0f} s"
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        if "failed" not in found.get(row["length"], {}):
            found[row["length"]] = row
    stopped = next((r["failed"] for r in found.values() if "failed" in r), None)
    last = [line for line in printed.strip().splitlines() if line.strip()][-1:] or ["nothing was printed"]
    for length in chosen.lengths:
        found.setdefault(length, {"failed": f"not reached: {stopped or last[0]}"[:300]})
    return found


class Rows:
    """A method's rows; its processes start when the first one is wanted."""

    def __init__(self, method: str, chosen: argparse.Namespace, run: Run):
        self.method, self.chosen, self.run = method, chosen, run
        self.measured: dict[int, dict[str, Any]] = {}

    def fill(self, length: int, row: dict[str, Any]) -> None:
        if not self.measured:
            seconds = min(self.chosen.each, max(30.0, self.run.seconds_left()))
            self.measured = launch(self.method, self.chosen, seconds)
        found = self.measured[length]
        if "failed" in found:
            raise RuntimeError(found["failed"])
        row.update({k: v for k, v in found.items() if k not in ("length", "rank")})


def main(words: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    for action in passed_on()._actions:
        if action.dest not in ("help", "device"):
            parser._add_action(action)
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--each", type=float, default=150, help="seconds after which a method is ended")
    chosen = parser.parse_args(words)
    run = Run("sequence-parallel", chosen, floors=False)
    names = [f"{method} {length}" for method in chosen.methods for length in chosen.lengths]
    run.check(names)
    for method in chosen.methods:
        rows = Rows(method, chosen, run)
        for length in chosen.lengths:
            run.measure(f"{method} {length}", partial(rows.fill, length))
    run.table(COLUMNS)


if __name__ == "__main__":
    main()
