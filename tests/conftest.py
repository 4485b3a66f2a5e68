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
