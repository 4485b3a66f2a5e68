"""PyTorch's own compiler bisector drives: it walks through its backends, comes to ours, and names the rewrite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import torch
from torch._inductor.compiler_bisector import CompilerBisector
import fuseline
import tests.debugging.faults
from tests.helpers.models import Mlp

torch.manual_seed(0)
models = [Mlp() for _ in range(3)]
x = torch.randn(4, 8)

def good():
    torch._dynamo.reset()
    for i, model in enumerate(models):
        # the second graph holds the fault
        pipeline = "planted{fault=planted-here}" if i == 1 else "planted"
        ours = CompilerBisector.get_backend() == "fuseline"  # the other backends refuse our options
        compiled = torch.compile(model, backend="fuseline", options={"pipeline": pipeline} if ours else None)
        with torch.no_grad():
            if not torch.allclose(compiled(x), model(x), atol=1e-4):
                return False
    return True

class Here(tests.debugging.faults.Fault):
    name = "planted-here"
    def before(self, x):
        return tests.debugging.faults.call("silu", x)
    def _is_here(self, node):
        return True
    def after(self, m, new):
        return new(torch.ops.aten.relu.default, m.x)

tests.debugging.faults.FAULTS["planted-here"] = Here
print(CompilerBisector.do_bisect(good))
"""


@pytest.mark.slow
def test_pytorchs_bisector_comes_to_our_rewrites(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    settings = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, **settings}, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-2:]
    found = next(line for line in last if line.startswith("BisectionResult"))
    assert "backend='fuseline'" in found and "subsystem='rewrites'" in found
    assert "planted/planted-here" in found and "script.py:" in found
