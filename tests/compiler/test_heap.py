"""What garbage collection leaves out while a program is compiled."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import fuseline  # noqa: F401
from fuseline.compiler.action import Observer
from fuseline.compiler.heap import settled
from fuseline.compiler.program import Program
from fuseline.compiler.report import Report


class Cycle:
    def __init__(self) -> None:
        self.own = self


def test_what_was_there_waits_and_what_is_new_does_not() -> None:
    before = weakref.ref(Cycle())
    with settled():
        assert gc.get_freeze_count() > 1000
        inside = weakref.ref(Cycle())
        gc.collect()
        assert inside() is None and before() is not None
    gc.collect()
    assert before() is None and gc.get_freeze_count() == 0


def test_it_ends_with_an_error_and_leaves_the_callers_frozen_heap() -> None:
    with pytest.raises(KeyError), settled():
        raise KeyError
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with settled():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


class Watch(Observer):
    def __init__(self, counts: list[int]):
        self.counts = counts

    def pipeline_ends(self, program: Program, report: Report) -> None:
        self.counts.append(gc.get_freeze_count())


def test_a_compilation_is_such_a_time() -> None:
    counts: list[int] = []

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) + 1

    options = {"pipeline": "raise{allow_empty}", "target": "eager", "observers": [Watch(counts)]}
    x = torch.randn(3)
    assert torch.equal(torch.compile(step, backend="fuseline", options=options)(x), step(x))
    assert counts and min(counts) > 1000 and gc.get_freeze_count() == 0
