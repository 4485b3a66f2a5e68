"""What this machine has, and one line for each thing that it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

import torch

from fuseline.compiler.errors import UserError, nearest

TARGETS = ("eager", "inductor", "triton")


def versions() -> dict[str, str | None]:
    """Versions of what a figure depends on; None for a package that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("fuseline", "torch", "triton", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    return found


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def has_compiler() -> bool:
    """A C++ compiler, which Inductor needs on a CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def choose_target(asked: str | None, device: str) -> tuple[str, list[str]]:
    """The target to run with and notes on what is missing.

    Without `asked`: triton on a GPU, else eager. A target that this machine cannot serve becomes eager, with a note.
    """
    if asked is not None and asked not in TARGETS:
        raise UserError(f"unknown target {asked!r}{nearest(asked, TARGETS)}")
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"device {device!r} was asked for and this machine has no GPU", remedy="leave out --device")
    notes = []
    target = asked or ("triton" if on_gpu else "eager")
    if not has("triton"):
        notes.append("triton is not installed: no kernels are compiled, everything runs in eager")
        target = "eager" if target == "triton" else target
    if not torch.cuda.is_available():
        how = "through Inductor" if target == "inductor" and has_compiler() else "in eager"
        notes.append(f"no GPU here: the model runs {how}; its kernels are compiled offline, not run")
    if target == "triton" and not on_gpu:
        notes.append("target triton needs --device cuda: running in eager")
        target = "eager"
    if target == "inductor" and not on_gpu and not has_compiler():
        notes.append("no C++ compiler here, which target inductor needs: running in eager")
        target = "eager"
    if not has("transformers"):
        notes.append("transformers is not installed: only py:, .pt2 and demo:tiny-decoder models load")
    return target, notes
