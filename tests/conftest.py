"""Marks: `gpu` tests are skipped without a CUDA device. `slow` and `distributed` are chosen by the Makefile's `-m`."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("FUSELINE_REPRO", "off")  # a failing command proves its reproducer in a process: seconds


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def only_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes of this package alone: the modules of other tests register faulty ones in the same process."""
    from fuseline.compiler import registry

    own = {name: kind for name, kind in registry.available().items() if kind.__module__.startswith("fuseline.")}
    monkeypatch.setattr(registry, "_known", own)
