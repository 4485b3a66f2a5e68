"""Arenas: the same memory at every call of one thread on one stream, and never anyone else's."""

from __future__ import annotations

import threading

import pytest
import torch

from fuseline.runtime import arena
from fuseline.runtime.arena import Plan

LIKE = torch.empty(0)


def sizes(n: int = 8):
    return (
        ((n, 4), None, torch.float32, 0, 1),
        ((n, 4), (1, n), torch.bfloat16, 1, 2),
        ((n,), None, torch.bool, 2, 3),
        ((0, n), None, torch.float32, 0, 3),
    )


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(arena, "_local", threading.local())


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    (first, end), (other, other_end) = ((x.data_ptr(), x.data_ptr() + _extent(x)) for x in (a, b))
    return first < other_end and other < end


def _extent(x: torch.Tensor) -> int:
    return (
        (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))) * x.element_size() if x.numel() else 0
    )


def test_values_have_the_described_layout_and_lie_apart_while_in_use():
    a, b, c, empty = Plan(sizes)(LIKE, 8)
    assert [x.dtype for x in (a, b, c)] == [torch.float32, torch.bfloat16, torch.bool]
    assert a.shape == b.shape == (8, 4) and b.stride() == (1, 8) and c.shape == (8,) and empty.shape == (0, 8)
    assert not overlap(a, b) and not overlap(b, c) and overlap(a, c)


def test_a_call_with_the_same_sizes_gets_the_same_tensors():
    plan = Plan(sizes)
    plan(LIKE, 16), plan(LIKE, 8)  # the memory has its size now
    assert plan(LIKE, 16) is plan(LIKE, 16) and plan(LIKE, 8) is plan(LIKE, 8)
    assert plan(LIKE, 16)[0].shape == (16, 4)


def test_plans_of_one_thread_share_their_memory_which_grows():
    small, large = Plan(sizes), Plan(sizes)
    before = small(LIKE, 8)
    assert overlap(before[0], Plan(sizes)(LIKE, 8)[0])
    after = large(LIKE, 4096)
    again = small(LIKE, 8)
    assert again is not before and overlap(again[0], after[0])
    assert arena.held() == {(torch.device("cpu"), 0): after[0].untyped_storage().nbytes()}
    before[0].fill_(1.0)  # who still holds the old memory may use it
    assert not overlap(before[0], again[0])


def test_threads_never_share():
    plan, found, barrier = Plan(sizes), [], threading.Barrier(4)

    def work():
        values = plan(LIKE, 64)
        barrier.wait()
        found.append(values)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(not overlap(a[0], b[0]) for i, a in enumerate(found) for b in found[:i])


def test_what_is_large_is_left_to_the_regions(monkeypatch):
    monkeypatch.setattr(arena, "LIMIT", 4096)
    plan = Plan(sizes)
    assert plan(LIKE, 8)[0] is not None
    assert plan(LIKE, 4096) == (None,) * 4 and plan(LIKE, 4096) is plan(LIKE, 4096)
    assert sum(arena.held().values()) <= 4096


def test_tensors_made_in_inference_mode_serve_outside_of_it():
    plan = Plan(sizes)
    with torch.inference_mode():
        plan(LIKE, 8)
    value = plan(LIKE, 8)[0]
    assert not value.is_inference() and not value.requires_grad
    value.add_(torch.ones(8, 4))


def test_the_number_of_remembered_sizes_is_bounded():
    plan = Plan(sizes)
    for n in range(1, 3 * arena.SETS):
        plan(LIKE, n)
    assert len(plan._local.known) <= arena.SETS
