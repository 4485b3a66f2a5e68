"""`fuseline doctor`: each shortcoming is named, with its cost and the command that mends it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fuseline import doctor
from fuseline.compiler.errors import UserError
from fuseline.doctor import checks, machine, trial
from fuseline.doctor.finding import BROKEN, MISSING, OK, SLOWER, Finding

ROOT = Path(__file__).resolve().parents[2]


def only(found: list[Finding], name: str) -> Finding:
    (one,) = [finding for finding in found if finding.name == name]
    return one


def test_this_machine_works(cli: Callable) -> None:
    result = cli("doctor", "--json", "-")
    data = json.loads(result.out)
    assert result.code == 0 and data["ok"], result.err
    assert {"python", "fuseline", "torch", "triton", "C++ compiler", "passes", "cache", "trial"} <= {
        finding["name"] for finding in data["findings"]
    }
    ours = [line for line in result.err.splitlines() if " torch/" not in line]  # PyTorch has warnings of its own
    assert max(map(len, ours)) <= 80 and "Fuseline works here." in result.err
    assert "compiled and run on" in only([Finding(**f) for f in data["findings"]], "trial").value


def test_what_is_wanting_has_a_remedy(cli: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FUSELINE_CACHE", "/proc/fuseline")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = cli("doctor", "--no-trial", "--json", "-")
    found = [Finding(**f) for f in json.loads(result.out)["findings"]]
    assert result.code == 0 and "nothing is broken" in result.err
    compiler = only(found, "C++ compiler")
    assert compiler.state == MISSING and "no-such-compiler (CXX)" in compiler.value
    assert "g++" in compiler.remedy or "gcc" in compiler.remedy or "xcode" in compiler.remedy
    assert only(found, "cache").state == SLOWER and "FUSELINE_CACHE=" in only(found, "cache").remedy
    assert only(found, "TRITON_INTERPRET").remedy == "unset TRITON_INTERPRET"
    assert all(f.effect for f in found if f.state != OK)


def test_without_triton_and_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    hidden = {"triton", "transformers"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    missing = checks.triton()
    assert missing.state == MISSING and "triton>=3.6" in missing.remedy
    assert "fuseline[hf]" in only(list(checks.extras()), "transformers").remedy


def test_a_compiler_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    (found,) = machine.compiler()
    assert found.state == MISSING and "Python.h" in found.value and "python3" in found.remedy


@pytest.mark.parametrize(("major", "state"), [(7, SLOWER), (9, OK)])
def test_gpus(monkeypatch: pytest.MonkeyPatch, major: int, state: str) -> None:
    facts = SimpleNamespace(name="GPU", total_memory=16 << 30, major=major, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: facts)
    (found,) = machine.gpu()
    assert found.state == state and f"16 GiB, sm_{major}5" in found.value
    assert (found.remedy is None) == (state == OK)


def test_a_gpu_that_this_build_of_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(machine, "_first_line", lambda command: "GPU 0: NVIDIA H100 (UUID: GPU-1)")
    (found,) = machine.gpu()
    assert found.state == BROKEN and "H100: torch is a build for CPUs" in found.value and found.remedy


def test_a_pass_that_does_not_load(monkeypatch: pytest.MonkeyPatch, cli: Callable) -> None:
    def fails() -> None:
        raise UserError("the pass 'x' of package 'y' cannot be loaded", ["y:x: ImportError"], "uninstall y")

    monkeypatch.setattr(checks.registry, "available", fails)
    result = cli("doctor", "--no-trial")
    assert result.code == 1 and "broken: passes" in result.out and "uninstall y" in result.out


def test_a_trial_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object, **options: object) -> None:
        raise UserError("no such thing")

    monkeypatch.setattr(trial, "compile_backend", refuses)
    torch._dynamo.reset()
    (found,) = trial.trial()
    assert found.state == BROKEN and "no such thing" in found.value


def test_a_check_that_fails_is_a_finding() -> None:
    def check() -> list[Finding]:
        raise RuntimeError("odd")

    (found,) = doctor.examine(trial=False, checks=(check,))
    assert found.state == BROKEN and found.value == "RuntimeError: odd"


@pytest.mark.slow
def test_a_pass_of_others_that_is_broken_does_not_keep_fuseline_from_being_imported() -> None:
    variables = {**os.environ, "FUSELINE_PASSES": "no_such_file.py", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fuseline", "doctor", "--no-trial"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "FUSELINE_PASSES names 'no_such_file.py'" in " ".join(done.stdout.split())
