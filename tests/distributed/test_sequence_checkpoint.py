"""A checkpoint of torch.distributed.checkpoint, saved at one degree of `sequence-parallel`, goes on at another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.sequence_checkpoint import run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]


@pytest.mark.parametrize("wrapped", [False, True], ids=["whole", "fully_shard"])
def test_another_degree(tmp_path: Path, wrapped: bool) -> None:
    """Weights and moments of two steps on three ranks, two more on two ranks: those of four steps in one process."""
    torch.multiprocessing.spawn(run, (3, str(tmp_path), "save", wrapped), nprocs=3)
    torch.multiprocessing.spawn(run, (2, str(tmp_path), "load", wrapped), nprocs=2)
    assert json.loads((tmp_path / "results.json").read_text())["error"] < 1e-8
