"""`sequence-parallel` as training uses it: batches that arrive cut, hybrids, torch's scaler, accumulated gradients.

One spawn a world size runs the cases of sequence_training.py; one test reads what they found, case by case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.sequence_training import CASES, run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]

SAYS = {
    "part_of_a_square_mask": ("is no part of a sequence along one dimension", "l_mask_", "a padding mask"),
    "hybrid_that_does_not_fit": ("cannot share degree 4 between heads and a ring of 3", "ring=2"),
}


def results(folder: Path, world: int, which: str) -> dict[str, Any]:
    torch.multiprocessing.spawn(run, (world, str(folder), which), nprocs=world)
    return json.loads((folder / "results.json").read_text())


def check(found: dict[str, dict[str, Any]], cases: str, bound: float) -> None:
    assert set(found) == {case.__name__ for case in CASES[cases]}
    wrong = {}
    for name, result in found.items():
        if name in SAYS:
            text = result.get("raised", "nothing was raised")
            if not all(part in text for part in SAYS[name]):
                wrong[name] = text
        elif not (result.get("loss", 1) <= bound and result.get("gradient", 1) <= bound):
            wrong[name] = result
    assert not wrong, wrong


@pytest.mark.parametrize("world", [2, 3])
def test_training(tmp_path: Path, world: int) -> None:
    check(results(tmp_path, world, "training"), "training", 1e-9)


def test_hybrids(tmp_path: Path) -> None:
    check(results(tmp_path, 4, "hybrids"), "hybrids", 1e-9)


def test_parts_of_library_models(tmp_path: Path) -> None:
    """Hugging Face's own code, which casts to float32 in norms and losses."""
    check(results(tmp_path, 2, "library"), "library", 1e-6)
