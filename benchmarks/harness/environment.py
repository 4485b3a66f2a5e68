"""The circumstances of a measurement: device, driver, clocks, versions, commit, command, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "triton", "transformers", "torchao", "gemlite")
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def ask(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def commit() -> str:
    """The checked-out commit; FUSELINE_COMMIT where the tree is a copy without its history; else "unknown"."""
    described = ask("git", "describe", "--always", "--dirty", "--exclude=*") if (ROOT / ".git").exists() else None
    return described or os.environ.get("FUSELINE_COMMIT") or "unknown"


def versions() -> dict[str, str]:
    """Versions of what is measured and of its peers, as far as they can be imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "torch": torch.__version__}  # with its build, which the package's metadata may leave out


def circumstances(device: torch.device) -> dict[str, Any]:
    """The record that every results file opens with."""
    found: dict[str, Any] = {"gpu": "none", "processor": platform.processor() or platform.machine()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ask("nvidia-smi", f"--query-gpu={','.join(('driver_version', *CLOCKS))}", "--format=csv,noheader")
        driver, *clocks = [word.strip() for word in (query or "unknown").splitlines()[0].split(",")]
        found |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "l2": getattr(properties, "L2_cache_size", 0),
            "driver": driver,
            "clocks": dict(zip(CLOCKS, clocks, strict=False)),
        }
    words = [shown(word) for word in sys.argv[1:] if word != "--resume"]
    return {
        **found,
        **versions(),
        "commit": commit(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def shown(word: str) -> str:
    """A word of the command line; of a path from the root only its name: the rest is one machine's."""
    return Path(word).name if word.startswith("/") else word


def short_name(gpu: str) -> str:
    """A GPU's name as files carry it: "NVIDIA H100 80GB HBM3" is "h100"; a machine without one is "cpu"."""
    words = [word.partition("-")[0] for word in gpu.lower().split()]
    numbered = [i for i, word in enumerate(words) if any(c.isdigit() for c in word)]
    if not numbered:
        return "cpu" if gpu == "none" else "-".join(words)
    first = numbered[0]
    return "-".join(words[first - 1 : first + 1]) if first and words[first - 1] in ("rtx", "gtx") else words[first]
