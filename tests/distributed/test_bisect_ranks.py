"""`fuseline bisect -- torchrun …`: every rank keeps to the same limit, and each says which rewrite it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.debugging.scripts import HERE

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = (
    HERE
    + """
import torch.distributed as dist
dist.init_process_group("gloo")
torch.manual_seed(0)
model, x = Mlp(), torch.randn(4, 8)
with torch.no_grad():
    expected = model(x)
    model.compile(backend="fuseline", options={"pipeline": "planted{fault=here}"})
    wrong = torch.tensor(float(not torch.allclose(model(x), expected, atol=1e-4)))
dist.all_reduce(wrong)
dist.destroy_process_group()
raise SystemExit(wrong.item() > 0)
"""
)


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_keep_to_one_limit(tmp_path: Path) -> None:
    script, found = tmp_path / "train.py", tmp_path / "found.json"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [sys.executable, "-m", "fuseline", "bisect", "--json", str(found), "--", *launch],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    data = json.loads(found.read_text())
    assert data["kind"] == "rewrite" and data["confidence"] == 1.0 and not data["also"]
    assert set(data["entries"]) == {"rank0", "rank1"}
    for entry in data["entries"].values():
        assert entry["rule"] == "here" and "train.py:" in entry["location"] and "silu" in entry["before"][0]
    assert f"FUSELINE_LIMIT={data['number']} " in data["commands"]["fails"]
    assert "rank0: #" in done.stdout and "rank1: #" in done.stdout
