"""`sequence-parallel` on several processes: loss and every gradient are those of one process.

One spawn a world size runs the cases of sequence_cases.py; one test reads what they found, case by case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.sequence_cases import CASES, REFUSED, run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

SAYS = {
    "unknown_op": ("cannot place the result of sort", "sequence_cases.py:", "sequence-parallel{gather=sort}"),
    "break_inside_attention": ("the graph ends at", "sequence_cases.py:", "torch.compiler.disable"),
    "too_short": ("positions cannot be cut for", "every rank needs one position"),
    "degree_that_does_not_fit": ("the degree has to divide their number", "degree=1 or"),
    "different_lengths": ("compile different graphs", "l_ids_ (1, 12)", "l_ids_ (1, 13)", "the same batch"),
    "ring_with_a_window": ("cannot send this attention around a ring", "kind=ulysses"),
    "unknown_mesh": ("there is no mesh dimension 'nowhere'", "mesh_dim_names"),
}


def results(folder: Path, world: int, which: str) -> dict[str, Any]:
    torch.multiprocessing.spawn(run, (world, str(folder), which), nprocs=world)
    return json.loads((folder / "results.json").read_text())


def check(found: dict[str, dict[str, Any]], bound: float) -> None:
    wrong = {}
    for name, result in found.items():
        if name in SAYS:
            text = result.get("raised", "nothing was raised")
            if not all(part in text for part in SAYS[name]):
                wrong[name] = text
        elif not (result.get("loss", 1) <= bound and result.get("gradient", 1) <= bound):
            wrong[name] = result
    assert not wrong, wrong


def test_two_processes(tmp_path: Path) -> None:
    found = results(tmp_path, 2, "short")
    assert set(found) == {case.__name__ for case in CASES["short"]}
    assert {case.__name__ for case in REFUSED} <= set(SAYS)
    check(found, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_decoders(tmp_path: Path, world: int) -> None:
    found = results(tmp_path, world, "long")
    assert set(found) == {case.__name__ for case in CASES["long"]}
    assert found.pop("sharded_logits")["shape"] == [2, 12 // world, 48]
    check(found, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_families(tmp_path: Path, world: int) -> None:
    """Hugging Face's own code, which casts to float32 in norms and losses."""
    check(results(tmp_path, world, "families"), 1e-6)
