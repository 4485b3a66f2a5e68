"""`checkpoint` on two processes: with `sequence-parallel`, `fully_shard` and regions of `torch.utils.checkpoint`, loss
and every gradient are bit by bit those of the same step without it.

One spawn runs the cases of checkpoint_cases.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.checkpoint_cases import BLOCKS, CASES, KEEP, LONG, NONE, OFFLOAD, RERUN, run

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed"),
]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run, (2, str(tmp_path)), nprocs=2)
    results: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {case.__name__ for case in CASES}
    for name, found in results.items():
        assert "raised" not in found, (name, found)
        assert found.pop("gradients") == 3 + 9 * BLOCKS, (name, found)
        assert all(result["equal"] for result in found.values()), (name, found)
    ours = results["with_sequence_parallel"]
    assert ours[KEEP]["exchanges"] == ours[NONE]["exchanges"] < ours[RERUN]["exchanges"]
    assert ours[NONE]["products"] < ours[KEEP]["products"] <= ours[RERUN]["products"]
    assert ours[OFFLOAD]["hosted"] > 0
    differ = results["plans_that_differ"]
    assert differ["second"] == differ[RERUN] and differ[RERUN]["exchanges"] > ours[NONE]["exchanges"]
    regions = [results[name] for name in ("in_regions_with_a_policy", "in_regions")]
    for found in regions:  # the user's wishes are kept, and the other blocks' are added
        assert found["region"]["products"] < found[LONG]["products"]
    assert regions[0]["region"]["products"] < regions[1]["region"]["products"]  # that policy keeps products
