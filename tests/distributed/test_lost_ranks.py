"""A rank that ends or goes another way ends the job: the rank, the collective and the line are named, in time."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from fuseline.runtime.ranks import Exchange, Running, judged
from tests.distributed.lost_ranks import TIMEOUT, run

needs_processes = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed in PyTorch")
LINE = re.compile(r"in (\w+) at \S*sequence_models\.py:\d+")
SPARE = 15
"""Seconds over the process group's: the error's own, and a machine that does other things."""


def said(folder: Path, case: str, rank: int, world: int = 2) -> tuple[float, str]:
    """Seconds until a rank raised, and what; a rank that ends takes no other with it."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=run, args=(r, world, str(folder), case)) for r in range(world)]
    for process in processes:
        process.start()
    path, patience = folder / f"rank-{rank}.txt", time.monotonic() + 900
    while not path.exists() and time.monotonic() < patience:
        time.sleep(0.5)
    time.sleep(1.0)
    for process in processes:
        process.kill()
        process.join()
    seconds, text = path.read_text().split("\n", 1)
    return float(seconds), text


@needs_processes
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("case", "rank", "headline"),
    [
        ("ends", 0, "rank 1 ended; rank 0 waited in"),
        ("stays_away", 0, "rank 1 went another way; rank 0 waited in"),
        ("hangs", 0, "rank 1 ended or hangs; rank 0 waited in"),
        ("other_length", 1, "rank 0 ended; rank 1 waited in"),  # gloo ends a process that is sent more than it expects
    ],
)
def test_the_rank_the_collective_and_the_line(tmp_path: Path, case: str, rank: int, headline: str) -> None:
    seconds, text = said(tmp_path, case, rank)
    assert text.startswith("RanksError: ") and headline in text, text
    assert LINE.search(text), text
    assert re.search(rf"rank {rank}: (forward|backward) of graph \d+.*: collective \d+ of \d+", text), text
    assert f"rank {1 - rank}: " in text and "try: " in text
    assert seconds < TIMEOUT + SPARE
    if case == "hangs":  # known before the collective fails, which another backend would not let us see
        log = (tmp_path / "log-0.txt").read_text()
        assert re.search(r"rank 1 has said nothing for \d+ s, last: .*; rank 0 waits: \w+ of graph \d+.*_models", log)


HERE = Running("forward of graph 1", (Exchange("all_to_all_single", "model.py:7", "g"),), {}, (12,))


def note(beat: int, place: str = "outside", failed: str | None = None) -> dict:
    return {"beat": beat, "place": place, "failed": failed}


@pytest.mark.parametrize(
    ("before", "after", "headline"),
    [
        ({1: note(3)}, {1: note(3)}, "rank 1 ended or hangs"),
        ({1: note(3)}, {1: note(3) | {"done": True}}, "rank 1 ended; rank 0 waited in"),
        ({1: note(3, failed=str(HERE)), 2: note(5)}, {1: note(3, failed=str(HERE)), 2: note(5)}, "rank 2 ended"),
        ({1: note(3), 2: note(4)}, {1: note(3), 2: note(4)}, "ranks 1, 2 ended"),
        ({1: note(3), 2: note(4)}, {1: note(7), 2: note(8, str(HERE))}, "rank 1 went another way"),
        ({1: note(3)}, {1: note(7, str(HERE))}, "rank 2 ran no compiled graph"),
        ({1: note(3, str(HERE)), 2: note(4)}, {1: note(7, str(HERE)), 2: note(8, str(HERE))}, "failed on every rank"),
    ],
)
def test_who_is_to_blame(before: dict, after: dict, headline: str) -> None:
    """A rank that fails because of another one is not taken for that one, though it falls silent too."""
    assert headline in str(judged(0, HERE, "Connection closed by peer", before, after, 3))


def test_where_a_process_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from fuseline.compiler import compat_distributed

    reached = {"g": 14, "h": 5}
    monkeypatch.setattr(compat_distributed, "sequence_number", reached.__getitem__)
    calls = (Exchange("all_to_all_single", "model.py:7", "g"), Exchange("ring_attention", "model.py:9", "h", 3),
             Exchange("all_reduce", "model.py:11", "g"))  # fmt: skip
    running = Running("forward of graph 1", calls, {"g": 13, "h": 2}, ())
    assert running.position() == (2, calls[1])
    reached["g"] = 15
    assert str(running) == "forward of graph 1: collective 3 of 3, all_reduce at model.py:11"
    reached.update(g=13, h=2)
    assert running.position() == (0, None) and "before its first collective" in str(running)
