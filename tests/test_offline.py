"""Nothing at run time opens a socket or starts pip: a process in which both are refused does what users do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
REFUSE = """
import sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto"):
        raise RuntimeError(f"the network was asked for: {event} {arguments[-1]}")
    if event == "subprocess.Popen" and "pip" in map(str, arguments[1]):
        raise RuntimeError(f"pip was started: {arguments[1]}")

sys.addaudithook(refuse)
"""
USE = """
import torch
import fuseline
from fuseline.cli import main

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = torch.nn.LayerNorm(16), torch.nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.relu(self.fc(self.norm(x)))

x = torch.randn(2, 16)
with torch.no_grad():
    torch.compile(Net(), backend="fuseline")(x)
    model = fuseline.optimize(Net().eval(), "quantize{weights=int8},fuse")
    expected = model(x)
    fuseline.save(model, "artifact")
    assert torch.equal(fuseline.load("artifact", Net)(x), expected)
fuseline.examine(Net(), x)

for command in (["doctor", "--no-trial"], ["passes"], ["cache", "size"],
                ["run", "demo:tiny-decoder", "-p", "quantize{weights=int8}", "--windows", "1", "--tokens", "1"],
                ["opt", "demo:tiny-decoder", "--dump", "stages"], ["view", "stages", "-o", "page.html"]):
    try:
        main(command)
    except SystemExit as end:
        assert not end.code, command
print("done")
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "FUSELINE_CACHE": str(folder / "cache")}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True)


@pytest.mark.slow
def test_no_network_at_run_time(tmp_path: Path) -> None:
    done = run(REFUSE + USE, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("done")


@pytest.mark.parametrize(
    "asks",
    [
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess; subprocess.run(['pip'])",
    ],
)
def test_the_test_would_see_it(asks: str, tmp_path: Path) -> None:
    done = run(REFUSE + asks, tmp_path)
    assert done.returncode and ("the network was asked for" in done.stderr or "pip was started" in done.stderr)


def test_a_page_asks_for_nothing_of_others(tmp_path: Path) -> None:
    """The page of `fuseline view` holds its scripts and styles; it names no address to load from."""
    assets = ROOT / "fuseline" / "view" / "assets"
    for path in assets.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "<script src" not in text and "@import" not in text and "fetch(" not in text, path.name
