"""What each process runs for test_lost_ranks.py: a rank that ends, one that stays away, one that brings another length.

The process group waits 20 seconds for a collective; what a rank raises is written to `rank-N.txt`.
"""

from __future__ import annotations

import datetime
import logging
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from fuseline.runtime import ranks
from tests.distributed.sequence_cases import compiled, decoder
from tests.distributed.sequence_models import batch

TIMEOUT = 20


_begun: list[float] = [time.monotonic()]


def begins() -> None:
    """Graphs are compiled; what fails is timed from here."""
    _begun.append(time.monotonic())


def steps(run, lengths: list[int]) -> None:
    for length in lengths:
        run(**batch(2, length)).backward()


def ends(rank: int, run) -> None:
    """Rank 1 is gone in the third step."""
    steps(run, [12, 12])
    begins()
    if rank == 1:
        os._exit(7)
    steps(run, [12])


def stays_away(rank: int, run) -> None:
    """Rank 1 makes one step less and does something else, longer than the others wait."""
    steps(run, [12, 12])
    begins()
    if rank == 1:
        time.sleep(TIMEOUT + 20)
        return
    steps(run, [12])


def other_length(rank: int, run) -> None:
    """Both graphs are compiled; then rank 1 runs the other one, and sends more than rank 0 expects."""
    torch._dynamo.config.automatic_dynamic_shapes = False
    steps(run, [12, 16])
    begins()
    steps(run, [16 if rank == 1 else 12])


def hangs(rank: int, run) -> None:
    """Rank 1 stops, with its connections open."""
    steps(run, [12, 12])
    begins()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    steps(run, [12])


CASES = {case.__name__: case for case in (ends, stays_away, other_length, hangs)}


def run(rank: int, world: int, folder: str, which: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("fuseline").setLevel(logging.ERROR)
    logging.getLogger("fuseline").addHandler(logging.FileHandler(Path(folder) / f"log-{rank}.txt"))
    where, timeout = f"file://{folder}/rendezvous", datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", where, rank=rank, world_size=world, timeout=timeout)
    torch.manual_seed(0)
    ranks.STILL, ranks.SILENT = 4.0, 8.0
    model = compiled(decoder())
    steps(model, [12])
    try:
        CASES[which](rank, model)
        said = "nothing was raised"
    except Exception as problem:
        said = f"{type(problem).__name__}: {problem}"
    (Path(folder) / f"rank-{rank}.txt").write_text(f"{time.monotonic() - _begun[-1]:.0f}\n{said}")
