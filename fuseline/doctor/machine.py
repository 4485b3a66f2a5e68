"""Checks of the machine: the C++ compiler with the headers it needs, the GPU, the processor."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch

from .finding import BROKEN, MISSING, OK, SLOWER, Finding

COMPILERS = ("g++", "clang++", "c++")
SECONDS = 20.0  # a driver's tool that does not answer by then will not


def compiler() -> Iterator[Finding]:
    """What Triton compiles its launchers with, Inductor its CPU code, and the runtime its checks before a replay."""
    command = shlex.split(os.environ.get("CXX", "")) or [c for c in COMPILERS if shutil.which(c)][:1]
    gpu = torch.cuda.is_available()
    effect = (
        "kernels cannot be launched: target triton fails"
        if gpu
        else "target inductor is not there; eager, all passes and offline compilation are"
    )
    state = BROKEN if gpu else MISSING
    if not command or shutil.which(command[0]) is None:
        named = f"{command[0]} (CXX) is not there" if command else "none"
        yield Finding("C++ compiler", state, named, effect, install("g++"))
        return
    python = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not python.is_file():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        yield Finding("C++ compiler", state, f"{command[0]}, without {python}", effect, install(package))
        return
    yield Finding("C++ compiler", OK, _first_line([*command, "--version"]) or command[0])


def gpu() -> Iterator[Finding]:
    """The GPUs that torch sees, or why it sees none."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            capability = f"sm_{facts.major}{facts.minor}" if torch.version.hip is None else facts.gcnArchName
            old = torch.version.hip is None and facts.major < 8
            yield Finding(
                f"GPU {index}",
                SLOWER if old else OK,
                f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {capability}",
                "no bfloat16 in hardware" if old else "",
                "fuseline run MODEL --device cuda --dtype float16" if old else None,
            )
        return
    shown = _first_line(["nvidia-smi", "-L"]) if shutil.which("nvidia-smi") else None
    effect = "models run in eager on the CPU; kernels are compiled offline, not run"
    if shown and shown.startswith("GPU"):
        cuda = torch.version.cuda
        why = f"torch is built for CUDA {cuda} and the driver refuses it" if cuda else "torch is a build for CPUs"
        remedy = "see https://pytorch.org/get-started/locally for the build of this driver"
        yield Finding("GPU", BROKEN, f"{shown.partition('(')[0].strip()}: {why}", effect, remedy)
    else:
        yield Finding("GPU", MISSING, "none that torch can use", effect)


def processor() -> Iterator[Finding]:
    """Cores that this process may use, and threads that torch does."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    idle = threads * 2 <= cores
    name = platform.processor() or platform.machine()
    yield Finding(
        "processor",
        SLOWER if idle else OK,
        f"{name}, {cores} cores, torch uses {threads} thread{'s' if threads != 1 else ''}",
        "cores are left idle" if idle else "",
        f"export OMP_NUM_THREADS={cores}" if idle else None,
    )


def install(package: str) -> str:
    """How this machine installs a package of its system."""
    commands = {
        "apt-get": f"apt-get install {package}",
        "dnf": f"dnf install {'gcc-c++' if package == 'g++' else package.replace('-dev', '-devel')}",
        "apk": f"apk add {package if package == 'g++' else 'python3-dev'}",
        "pacman": f"pacman -S {'gcc' if package == 'g++' else 'python'}",
        "brew": "xcode-select --install",
    }
    found = next((text for tool, text in commands.items() if shutil.which(tool)), None)
    if found is not None:
        return found
    return "install Visual Studio's C++ build tools" if platform.system() == "Windows" else f"install {package}"


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.splitlines()), None) if done.returncode == 0 else None
