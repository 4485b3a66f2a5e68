"""Rerun: a reproducer is run once in a fresh process before anybody is told of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 600.0
# A fresh process makes no reproducers of its own, leaves out no rewrites, and writes into nobody's trace.
_DROPPED = (
    "FUSELINE_LIMIT",
    "FUSELINE_SKIP",
    "FUSELINE_JOURNAL",
    "TORCH_TRACE",
    "TORCH_LOGS",
    "COVERAGE_PROCESS_START",
)


@dataclass(frozen=True)
class Rerun:
    """What a fresh process made of a reproducer.

    status: "reproduces", "passes" (nothing is wrong any more), "different" (another fault), or "unusable": the file
    could not be run at all. found: what it printed as data (`fuseline repro FILE --json`).
    """

    status: str
    reason: str = ""
    found: dict[str, Any] | None = None

    @property
    def reproduced(self) -> bool:
        return self.status == "reproduces"


def rerun(path: str | Path, seconds: float = SECONDS) -> Rerun:
    """Runs `fuseline repro PATH` in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="fuseline-rerun-") as folder:
        answer = Path(folder) / "answer.json"
        command = [
            sys.executable, "-P", "-m", "fuseline", "repro", str(Path(path).resolve()), "--here", "--json", str(answer),
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, env=_environment(), capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            return Rerun("different", f"it was not done after {seconds:g} s")
        try:
            found = json.loads(answer.read_text(encoding="utf-8"))
            return Rerun(found["status"], found.get("found", {}).get("message", ""), found)
        except (OSError, ValueError, KeyError):
            return _without_answer(done)


def _without_answer(done: subprocess.CompletedProcess[str]) -> Rerun:
    if done.returncode < 0:
        return Rerun("different", f"the process was killed by signal {-done.returncode}")
    said = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
    return Rerun("unusable", (errors or said or [f"exit code {done.returncode}"])[-1])


def _environment() -> dict[str, str]:
    ours = str(Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, [ours, os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if name not in _DROPPED}
    return {**kept, "PYTHONPATH": path, "FUSELINE_REPRO": "off"}
