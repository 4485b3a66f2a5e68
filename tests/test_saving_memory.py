"""Peak host memory of fuseline.load and of the first calls, against the artifact's bytes, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SAVE = """
import sys, torch, transformers, fuseline
layers, width = int(sys.argv[2]), int(sys.argv[3])
config = transformers.LlamaConfig(
    vocab_size=4096, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=16,
    num_key_value_heads=4, max_position_embeddings=256, dtype="bfloat16",
)
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    model = transformers.LlamaForCausalLM(config).eval()
rotary = type(model.model.rotary_emb)(config)
model.to_empty(device="cpu")
model.model.rotary_emb = rotary
torch.manual_seed(0)
with torch.no_grad():
    for p in model.parameters():
        p.normal_(std=0.02) if p.dim() > 1 else p.fill_(1)
fuseline.optimize(model, "raise,quantize{weights=int8},fuse", keep_originals=False)
ids = torch.arange(16)[None]
with torch.no_grad():
    logits, tokens = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
fuseline.save(model, sys.argv[1])
torch.save((ids, logits, tokens), sys.argv[1] + ".pt")
"""

LOAD = """
import json, sys, torch, transformers, fuseline
from transformers import LlamaForCausalLM

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

ids, logits, tokens = torch.load(sys.argv[1] + ".pt")
before = status("VmRSS")
model = fuseline.load(sys.argv[1])
peaks = {"load": status("VmHWM") - before}
same = torch.equal(model(ids).logits, logits)
peaks["first call"] = status("VmHWM") - before
same &= torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), tokens)
peaks["generate"] = status("VmHWM") - before
print(json.dumps({"same": same, "peaks": peaks}))
"""


def run(script: str, *arguments: object) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def measure(folder: Path, layers: int, width: int) -> tuple[int, dict[str, int]]:
    """The artifact's bytes and the growth of the peak of resident memory over what the imports took."""
    run(SAVE, folder, layers, width)
    found = json.loads(run(LOAD, folder).splitlines()[-1])
    assert found["same"]
    return sum(p.stat().st_size for p in folder.iterdir()), found["peaks"]


def test_loading_and_running_takes_little_more_than_the_artifact(tmp_path: Path, capsys) -> None:
    """A model of 0.99e9 parameters in bfloat16, int8: 1.0 GB; and a tiny one, for what PyTorch takes at any size."""
    size, peaks = measure(tmp_path / "large", 16, 2048)
    _, fixed = measure(tmp_path / "tiny", 16, 64)
    with capsys.disabled():
        print(f"\nartifact {size / 1e6:.0f} MB, peak growth / artifact (and that of a tiny model of as many layers):")
        for step, peak in peaks.items():
            print(f"  after {step}: {peak / size:.3f}  ({fixed[step] / 1e6:.0f} MB)")
    assert size > 0.95e9
    assert peaks["load"] <= 1.1 * size
    assert peaks["first call"] <= 1.3 * size
    assert peaks["generate"] <= 1.3 * size
