"""Parameters sharded by PyTorch: `fully_shard` (FSDP2) and tensor-parallel DTensors, on two processes.

One spawn runs a list of cases of sharding_cases.py, and one test reads what they found, case by case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.sharding_cases import CASES, run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]


@pytest.mark.parametrize("which", ["short", pytest.param("long", marks=pytest.mark.slow)])
def test_two_processes(which: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run, (2, str(tmp_path), which), nprocs=2)
    results = json.loads((tmp_path / "results.json").read_text())
    for case in CASES[which]:
        globals()[f"check_{case.__name__}"](results[case.__name__])


def check_fsdp_forward(found: dict[str, Any]) -> None:
    """Blocks share one compilation; parameters that are gathered anew, with other values, are read anew."""
    assert found.get("error", 1) < 1e-5 and found["captures"] == 1 and found["raised"] >= 1, found


def check_training(found: dict[str, Any]) -> None:
    assert found.get("loss", 1) < 1e-5 and found["parameters"] < 1e-5, found


check_fsdp_training = check_fsdp_blocks_compiled_apart = check_fsdp_optimized_before = check_training
check_dtensor_training = check_training


def check_fsdp_quantized(found: dict[str, Any]) -> None:
    """Gathered parameters are the same tensors, of the same versions, when they hold other values: a derived weight
    would be stale."""
    assert "weight 'gate.weight' is gathered by fully_shard at each forward" in found["raised"]
    assert "try: name passes that leave weights as they are (raise,fuse)" in found["raised"]


def check_dtensor_forward(found: dict[str, Any]) -> None:
    assert found.get("error", 1) < 1e-5, found
    assert any("a graph runs as it was captured, without passes" in line for line in found["told"])
    assert any("'blocks.0.gate.weight' is a DTensor placed as (Shard(dim=0),)" in line for line in found["told"])


def check_dtensor_quantized(found: dict[str, Any]) -> None:
    assert "pass 'quantize' cannot rewrite a graph with parameters of type DTensor" in found["raised"]
    assert "run it on a model that is not parallelized" in found["raised"]
