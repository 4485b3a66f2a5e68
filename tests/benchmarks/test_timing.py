"""The harness's arithmetic on times."""

from __future__ import annotations

import pytest
import torch
from harness import Timing, graph_replays, repeated, replayed, rotated
from harness.stages import Stages
from harness.timing import COPIES, ROTATED_BYTES, paired

CPU = torch.device("cpu")


def test_median_spread_and_parts() -> None:
    timing = Timing((4.0, 1.0, 2.0, 100.0))
    assert timing.median == 3.0 and timing.spread == (1.0, 100.0)
    assert timing.per(2).seconds == (2.0, 0.5, 1.0, 50.0)
    assert timing.row("ms", 1e3) == {"ms": 3e3, "ms_spread": [1e3, 1e5]}


def test_what_two_lengths_share_falls_out() -> None:
    step, common = 0.007, [0.5, 0.9]
    timing = paired([96 * step + c for c in common], [32 * step + c for c in common], 64)
    assert timing.seconds == pytest.approx((step, step))


def test_the_warm_up_is_not_timed() -> None:
    calls: list[int] = []
    timing = repeated(lambda: calls.append(1), repeats=5, device=CPU, warmup=3)
    assert len(calls) == 8 and len(timing.seconds) == 5 and min(timing.seconds) >= 0


def test_each_copy_is_used() -> None:
    seen: list[int] = []
    replayed(seen.append, 4, CPU)()
    assert seen == [0, 1, 2, 3]
    assert len(graph_replays(seen.append, 4, CPU, replays=6).seconds) == 6


@pytest.mark.parametrize("size", [1, 100, 10**6, 10**8, 10**10])
def test_rotated_copies_exceed_the_cache(size: int) -> None:
    copies = rotated(size, CPU)
    assert COPIES[0] <= copies <= COPIES[1]
    assert copies == COPIES[1] or copies * size > ROTATED_BYTES


class Thing:
    def inner(self, seconds: float) -> float:
        Clock.now += seconds
        return seconds

    def outer(self) -> float:
        Clock.now += 1.0
        return self.inner(2.0) + self.inner(3.0)


class Clock:
    now = 0.0


def test_stages_are_summed_for_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.stages.time.perf_counter", lambda: Clock.now)
    original, thing = Thing.inner, Thing()
    stages = Stages({"outer": (Thing, "outer"), "inner": (Thing, "inner")})
    with stages.watching():
        for _ in range(3):
            stages.step(thing.outer)
    assert stages.steps == [{"step": 6.0, "outer": 6.0, "inner": 5.0}] * 3
    assert stages.medians(scale=1) == {"step": 6.0, "outer": 6.0, "inner": 5.0}
    assert stages.difference("outer", "inner", scale=1) == 1.0
    assert Thing.inner is original


def test_functions_are_put_back_after_an_error() -> None:
    original = Thing.outer
    with pytest.raises(KeyError), Stages({"outer": (Thing, "outer")}).watching():
        raise KeyError
    assert Thing.outer is original
