"""One process of one method: steps at growing lengths until one does not fit, a line of JSON each.

torchrun --nproc-per-node=2 benchmarks/sequences/worker.py --method ulysses --lengths 8192 32768 --out rows.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sequences.methods import METHODS


def options() -> argparse.ArgumentParser:
    """What the driver passes on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 131072])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--tiles", type=int, default=8, help="parts of MLP and loss in alst")
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute each layer (not fuseline: its pipeline)"
    )
    parser.add_argument("--pipeline", default="raise,fuse-loss,sequence-parallel", help="fuseline's passes")
    parser.add_argument("--target", default="inductor", help="fuseline's target")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def main() -> None:
    parser = options()
    parser.add_argument("--method", choices=[*METHODS], required=True)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    on_gpu = chosen.device.startswith("cuda")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if chosen.method.startswith("fuseline"):
        chosen.checkpointing = False
    for length in chosen.lengths:
        row: dict[str, Any] = {"length": length}
        try:
            row.update(measure(chosen, length, device))
        except torch.OutOfMemoryError as error:
            wanted = re.search(r"allocate ([\d.]+ \w+)", str(error))
            row["failed"] = f"out of memory at {wanted[1]}" if wanted else "out of memory"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        if rank == 0 or "failed" in row:
            with chosen.out.open("a") as out:
                out.write(json.dumps({**row, "rank": rank}) + "\n")
        if "failed" in row:  # the other ranks may wait inside a collective: the launcher ends them
            sys.exit(1)
    dist.destroy_process_group()


def measure(chosen: argparse.Namespace, length: int, device: torch.device) -> dict[str, Any]:
    """Tokens a second of all ranks together, peak memory of the fullest rank, the first loss."""
    on_gpu, world = device.type == "cuda", dist.get_world_size()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model, step = METHODS[chosen.method](chosen, length, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=on_gpu)
    torch.manual_seed(1)
    ids = torch.randint(0, 64 if chosen.shape == "tiny" else 128000, (1, length), device=device)

    def once() -> torch.Tensor:
        loss = step(ids, ids)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    began = time.perf_counter()
    first = _mean(once(), chosen.method)
    for _ in range(chosen.warm - 1):
        once()
    _wait(device)
    warm = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(chosen.steps):
        once()
    _wait(device)
    seconds = (time.perf_counter() - began) / chosen.steps
    tokens = length * (world if chosen.method == "fsdp" else 1)
    peak = torch.tensor([torch.cuda.max_memory_allocated() if on_gpu else 0], device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {"loss": first, "step_s": seconds, "tokens_s": tokens / seconds, "peak_gb": int(peak) / 1e9, "warm_s": warm}


def _mean(loss: torch.Tensor, method: str) -> float:
    """The loss of the whole batch: by hand each rank has its share times their number."""
    total = loss.clone().float()
    if not method.startswith("fuseline"):
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return float(total)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


if __name__ == "__main__":
    main()
