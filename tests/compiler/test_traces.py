"""TORCH_LOGS and TORCH_TRACE: PyTorch's own switches show what a pipeline does, in a script that imports only torch."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch._logging._internal import TorchLogsFormatter

import fuseline
from fuseline.compiler import compat
from fuseline.compiler.observe import Logged, Structured
from fuseline.compiler.observe.ambient import ambient

SCRIPT = """
import torch
{before}

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = torch.nn.RMSNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.fc(self.norm(x))) * 2

net = torch.compile(Net().eval(), backend="fuseline", options={options})
with torch.no_grad():
    print(net(torch.ones(2, 8)).shape)
"""
OLDER = """
# The rule of earlier versions: a module's name stands for itself, and it is looked up without being imported.
import os
torch._logging._internal._get_module_and_submodules = lambda name: None
os.environ["TORCH_LOGS"] = "+fuseline"
torch._logging._init_logs()
"""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = torch.nn.RMSNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.relu(self.fc(self.norm(x))) * 2


def run_script(
    folder: Path, before: str = "", options: str = "{}", **environment: str
) -> subprocess.CompletedProcess[str]:
    """The script in a fresh process."""
    path = folder / "script.py"
    path.write_text(SCRIPT.format(before=before, options=options))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_")}
    done = subprocess.run(
        [sys.executable, str(path)],
        env={**clean, "FUSELINE_CACHE": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "torch.Size([2, 8])" in done.stdout, done.stderr
    return done


def artifacts(folder: Path) -> dict[str, str]:
    """Name → payload of the artifacts in a folder that TORCH_TRACE wrote, in order."""
    (path,) = folder.glob("*.log")
    found: dict[str, str] = {}
    name = None
    for line in path.read_text(encoding="utf-8").splitlines():
        record = re.match(r"^V\d+ \S+ \d+ \S+\] (\{.*\})$", line)
        if record:
            name = json.loads(record[1]).get("artifact", {}).get("name")
            if name is not None:
                found[name] = ""
        elif name is not None:
            found[name] += line.removeprefix("\t") + "\n"
    return found


def test_a_script_that_imports_only_torch_is_watched(tmp_path: Path) -> None:
    done = run_script(tmp_path, TORCH_LOGS="+fuseline", TORCH_TRACE=str(tmp_path / "trace"))
    lines = [line.partition("] [0/0] ")[2] for line in done.stderr.splitlines() if "graph 0/0" in line]
    rewrite = re.match(r"graph 0/0: #1 raise/RMSNorm at norm/rms_norm#0, by (.*):(\d+)$", lines[0])
    assert rewrite and "class " in Path(rewrite[1]).read_text().splitlines()[int(rewrite[2]) - 1]
    assert re.match(r"graph 0/0: raise: 1 site, 0 refused, 9 → 9 nodes, [\d.]+ ms$", lines[1])
    assert re.match(
        r"graph 0/0: 9 → 6 nodes by raise\{allow_empty\},fuse-loss\{allow_empty\},fuse\{allow_empty\}, [\d.]+ ms$",
        lines[-1],
    )

    found = {name: text for name, text in artifacts(tmp_path / "trace").items() if name.startswith("fuseline")}
    assert list(found) == [
        "fuseline_000_captured", "fuseline_001_raise", "fuseline_002_fuse-loss", "fuseline_003_fuse",
        "fuseline_report",
    ]  # fmt: skip
    assert 'rms_norm: "f32[2, 8]" = torch.ops.aten.rms_norm.default' in found["fuseline_000_captured"]
    assert "torch.ops.fuseline.rms_norm.default" in found["fuseline_001_raise"]
    assert "class linear_0(torch.nn.Module)" in found["fuseline_003_fuse"]
    assert [p["matched"] for p in json.loads(found["fuseline_report"])["passes"]] == [1, 0, 1]


@pytest.mark.slow
def test_the_levels_and_the_rule_of_earlier_versions(tmp_path: Path) -> None:
    info = run_script(tmp_path, TORCH_LOGS="fuseline").stderr
    assert "raise: 1 site" in info and "raise/RMSNorm" not in info
    assert "raise/RMSNorm at norm" in run_script(tmp_path, before=OLDER).stderr
    assert "graph 0/0" not in run_script(tmp_path).stderr


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import fuseline", "import fuseline.cli", "import fuseline.compiler.capture"])
def test_the_package_may_be_imported_first(first: str) -> None:
    """PyTorch imports what TORCH_LOGS names, while it is imported itself by that very package."""
    code = f"{first}, torch; import fuseline; print(fuseline.Pipeline('raise,fuse'), len(fuseline.__all__))"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TORCH_LOGS": "+fuseline"}, capture_output=True, text=True
    )
    assert done.stdout == f"raise,fuse {len(fuseline.__all__)}\n", done.stderr


@pytest.mark.slow
def test_kernels_are_traced(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    trace = tmp_path / "trace"
    run_script(tmp_path, options="{'target': 'triton'}", TORCH_TRACE=str(trace), TRITON_INTERPRET="1")
    found = artifacts(trace)
    manifest = json.loads(found["fuseline_manifest"])
    assert "@triton.jit" in found["fuseline_module"]
    assert found["fuseline_module"].strip() == Path(manifest["path"]).read_text(encoding="utf-8").strip()
    assert manifest["kernels"]


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.setFormatter(TorchLogsFormatter(trace=True))

    def emit(self, record: logging.LogRecord) -> None:
        name = record.metadata.get("artifact", {}).get("name", "")
        if name.startswith("fuseline"):
            self.found[name] = record.payload


@pytest.fixture
def trace():
    """PyTorch's structured trace, in memory."""
    handler, log = Kept(), logging.getLogger("torch.__trace")
    log.addHandler(handler)
    yield handler.found
    log.removeHandler(handler)


@dataclass(frozen=True)
class HalfWay(fuseline.Pass):
    name = "half-way"

    def run(self, program, rewriter):
        super().run(program, rewriter)
        raise RuntimeError("no further")

    def rules(self, program):
        return fuseline.Pipeline("raise").passes[0].rules(program)


def test_a_pass_that_fails_leaves_its_graph(trace: dict[str, str]) -> None:
    program = fuseline.capture(Net(), (torch.ones(2, 8),))
    with pytest.raises(fuseline.FuselineError, match="no further"):
        fuseline.Pipeline([HalfWay()]).run(program)
    assert list(trace) == ["fuseline_000_captured", "fuseline_001_half-way_failed"]
    assert trace["fuseline_001_half-way_failed"].startswith("# where half-way failed: RuntimeError: no further\n")
    assert "torch.ops.fuseline.rms_norm" in trace["fuseline_001_half-way_failed"]


def test_nothing_is_attached_unasked(caplog: pytest.LogCaptureFixture) -> None:
    assert not compat.structured_tracing()
    assert not [o for o in ambient() if isinstance(o, (Logged, Structured))]
    with caplog.at_level(logging.INFO, logger="fuseline"):
        assert [type(o) for o in ambient()] == [Logged]
        fuseline.Pipeline("raise").run(fuseline.capture(Net(), (torch.ones(2, 8),)))
    assert re.match(r"run \d+: raise: 1 site, 0 refused", caplog.messages[0])
    assert len(caplog.messages) == 2


def test_refusals_are_logged_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    class Two(Net):
        def __init__(self) -> None:
            super().__init__()
            self.odd = torch.nn.Linear(8, 12)
            self.last = torch.nn.Linear(12, 8)

        def forward(self, x):
            return self.last(self.odd(x))

    program = fuseline.capture(Two(), (torch.ones(2, 8),))
    with caplog.at_level(logging.DEBUG, logger="fuseline"):
        fuseline.Pipeline("quantize{weights=int8:g8}").run(program)
    assert any("quantize refused last/linear#0: group size 8 does not divide 12" in m for m in caplog.messages)
