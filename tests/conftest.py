"""Marks: `gpu` tests are skipped without a CUDA device. `slow` and `distributed` are chosen by the Makefile's `-m`.

`quick` is given here, to the files below: `pytest -m quick` tells in under three minutes, without make, whether
Fuseline works on a machine. With that expression the other files are not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import pytest
import torch

os.environ.setdefault("FUSELINE_REPRO", "off")  # a failing command proves its reproducer in a process: seconds

TESTS = Path(__file__).parent
QUICK = frozenset(
    TESTS / f"{name}.py"
    for name in (
        "test_backend", "test_layout", "test_optimize", "test_public_api", "test_schemas",
        "cli/test_doctor", "cli/test_errors", "cli/test_help", "cli/test_missing",
        "codegen/test_emitter",
        "compiler/test_capture_dynamo", "compiler/test_capture_export",
        "compiler/test_normal_form", "compiler/test_pattern", "compiler/test_pipeline", "compiler/test_plan",
        "compiler/test_rewriter", "compiler/test_verifier", "compiler/test_weights",
        "models/test_spec",
        "passes/test_before_after", "passes/test_raise_rules", "passes/test_recipes",
    )
)  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    only_quick = config.option.markexpr.strip() == "quick"
    return True if only_quick and collection_path.suffix == ".py" and collection_path not in QUICK else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thin(items)
    for item in items:
        if item.path in QUICK and not any(item.get_closest_marker(mark) for mark in ("slow", "gpu", "distributed")):
            item.add_marker(pytest.mark.quick)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def thin(items: list[pytest.Item]) -> None:
    """`one_in(n)`: of a test's cases, one in n stays, the others are slow. Which, is drawn by a hash of their names, so
    that cases of several parameters are not all of one value, and every process draws the same."""
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("one_in") is not None:
            families.setdefault(item.nodeid.split("[")[0], []).append(item)
    for cases in families.values():
        share = cases[0].get_closest_marker("one_in").args[0]
        quick = [item for item in cases if not item.get_closest_marker("slow")]
        quick.sort(key=lambda item: crc32(item.name.encode()))
        for item in quick[-(-len(quick) // share) :]:
            item.add_marker(pytest.mark.slow)


#: Optional packages, and what installs them. A test that asks for one that is not there is skipped, whatever it is.
EXTRAS = {
    "transformers": "'fuseline[hf]'",
    "gguf": "'fuseline[hf]'",
    "accelerate": "'fuseline[hf]'",
    "triton": "'triton>=3.6'",
    "compressed_tensors": "compressed-tensors",
    "peft": "peft",
    "jsonschema": "jsonschema",
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except Exception as error:
        if (reason := missing_extra(error)) is not None:
            pytest.skip(reason)
        raise


def missing_extra(error: BaseException | None) -> str | None:
    """Why a test that failed so is skipped: an optional package is not installed. None where all are."""
    while error is not None:
        for name, wanted in EXTRAS.items():
            asked = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == name
            if (asked or f"needs the package '{name}'" in str(error)) and find_spec(name) is None:
                return f"{name} is not installed: pip install {wanted}"
        error = error.__cause__ or getattr(error, "inner_exception", None) or error.__context__
    return None


@pytest.fixture
def only_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of this package alone: the modules of other tests register faulty ones in the same process."""
    from fuseline.compiler import registry

    own = {name: kind for name, kind in registry.available().items() if kind.__module__.startswith("fuseline.")}
    monkeypatch.setattr(registry, "_known", own)
