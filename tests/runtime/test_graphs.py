"""Captures: when a call is recorded, what is copied, and what makes another capture. The GPU is played by a recorder
that runs the work again at each replay; tests/gpu has the real one."""

from __future__ import annotations

import gc
from typing import Any

import numpy
import pytest
import torch
from torch.nn import Parameter

from fuseline.compiler.binder import Binder, refresh
from fuseline.compiler.expressions import Constant, Param, Scale
from fuseline.compiler.weights import WeightStore
from fuseline.runtime import graphs, native
from fuseline.runtime.graphs import CudaGraphs, Layout

DOUBLED = Scale(Param("w"), Constant((2.0,), (1,), torch.float32, "cpu"), 0)


@pytest.fixture(params=["C++", "Python"], autouse=True)
def checks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds with either check of addresses and versions."""
    if request.param == "Python":
        monkeypatch.setattr(native, "module", lambda name: None)


class Rerun:
    """Replays by running the graph again on the memory that was recorded, into the first results; counts recordings and
    replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.recording = False
        self.calls: list[tuple[Any, list[Any]]] = []

    def noting(self, run: Any) -> Any:
        """`run`, whose calls are noted while they are recorded: where its arguments lie then, and nothing else."""

        def noted(*given: Any) -> Any:
            if self.recording:
                self.calls.append((run, [x.detach() if isinstance(x, torch.Tensor) else x for x in given]))
            return run(*given)

        return noted

    def busy(self) -> bool:
        return self.recording

    def place(self) -> int:
        return 0

    def record(self, work: Any) -> Any:
        self.recorded += 1
        snapshot = [t.clone() for t in Step.caches]
        self.recording = True
        results = list(work())
        self.recording = False
        for cache, before in zip(Step.caches, snapshot, strict=True):
            cache.copy_(before)  # recording runs nothing
        run, given = self.calls.pop()

        def replay() -> None:
            self.replayed += 1
            for kept, fresh in zip(results, run(*given), strict=True):
                kept.copy_(fresh)

        return replay, results


def capturing(run: Any, layout: Layout, binder: Binder, recorder: Rerun) -> CudaGraphs:
    return CudaGraphs(recorder.noting(run), layout, binder, recorder)


class Step:
    """cache[at] = x @ w; returns (cache.sum(), x * 2w). Arguments: x, cache, at, w."""

    caches: list[torch.Tensor] = []

    def __init__(self, symbolic: bool = False) -> None:
        self.recorder = Rerun()
        self.plain_calls = 0
        binder = Binder([Param("w"), DOUBLED], {"w": 3}, WeightStore())
        self.graphs = capturing(self.run, Layout([0, 1, 2], [1], symbolic), binder, self.recorder)

    def run(self, x: torch.Tensor, cache: torch.Tensor, at: torch.Tensor, w: Any, doubled: Any) -> list[torch.Tensor]:
        self.plain_calls += 1
        cache.index_copy_(0, at, (x * w).sum()[None])
        return [cache.sum(), x * doubled]

    def __call__(self, x: torch.Tensor, cache: torch.Tensor, at: int, w: Any) -> tuple[torch.Tensor, ...]:
        Step.caches = [cache]
        return tuple(self.graphs((x, cache, torch.tensor([at]), w)))


def expected(x: torch.Tensor, cache: torch.Tensor, at: int, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    cache[at] = (x * w).sum()
    return cache.sum(), x * 2 * w


def weight(value: float = 3.0) -> Parameter:
    return Parameter(torch.full((1, 4), value), requires_grad=False)


def check(step: Step, cache: torch.Tensor, twin: torch.Tensor, at: int, w: torch.Tensor, size: int = 1) -> Any:
    x = torch.randn(size, 4)
    results = step(x, cache, at, w)
    for got, want in zip(results, expected(x, twin, at, w), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(cache, twin)
    return results


@pytest.mark.one_in(2)
def test_the_third_call_is_recorded_and_later_ones_replayed() -> None:
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(8):
        check(step, cache, twin, at, w)
    assert (step.recorder.recorded, step.recorder.replayed) == (1, 6)


def test_results_that_a_caller_kept_do_not_change() -> None:
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    kept = [check(step, cache, twin, at, w) for at in range(6)]
    copies = [[t.clone() for t in results] for results in kept]
    check(step, cache, twin, 6, w)
    for results, before in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, before, strict=True))


def test_another_cache_is_another_capture_and_the_first_one_is_kept() -> None:
    step, w = Step(), weight()
    pairs = [(torch.zeros(8), torch.zeros(8)) for _ in range(2)]
    for _ in range(2):
        for cache, twin in pairs:
            for at in range(4):
                check(step, cache, twin, at, w)
    assert step.recorder.recorded == 2


def test_weights_edited_replaced_or_moved_are_noticed() -> None:
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(4):
        check(step, cache, twin, at, w)
    w.mul_(2)  # the plain weight is read where it lies; the derived one is computed again
    for at in range(4):
        check(step, cache, twin, at, w)
    w.data = torch.full((1, 4), 7.0)
    for at in range(4):
        check(step, cache, twin, at, w)
    other = weight(11.0)
    for at in range(4):
        check(step, cache, twin, at, other)
    assert step.recorder.recorded == 4


def test_a_moved_or_freed_cache_is_noticed() -> None:
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(4):
        check(step, cache, twin, at, w)
    cache.data = cache.data.clone()
    for at in range(4):
        check(step, cache, twin, at, w)
    assert step.recorder.recorded == 2
    cache.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        check(step, cache, twin, 0, w)
    assert step.recorder.replayed == 4, "nothing wrote to memory that is gone"


class Derived:
    """x * 2w + (cache += 1).sum(), where only what was derived from w is read."""

    def __init__(self, w: Parameter) -> None:
        self.w, self.store, self.recorder = w, WeightStore(), Rerun()
        self.cache, self.twin = torch.zeros(8), torch.zeros(8)
        binder = Binder([DOUBLED], {"w": 2}, self.store)
        self.graphs = capturing(lambda x, c, d: [x * d + c.add_(1).sum()], Layout([0, 1], [1]), binder, self.recorder)

    def check(self, value: float, calls: int = 4) -> None:
        Step.caches = [self.cache]
        for _ in range(calls):
            x = torch.randn(1, 4)
            got = self.graphs((x, self.cache, self.w))[0]
            torch.testing.assert_close(got, x * 2 * value + self.twin.add_(1).sum())


def test_dropped_parameters_that_get_values_are_noticed() -> None:
    step = Derived(weight(3.0))
    step.check(3.0, calls=1)
    step.store.drop([step.w])
    step.check(3.0)
    assert step.recorder.recorded == 1
    step.w.data = torch.full((1, 4), 5.0)
    step.check(5.0)
    assert step.recorder.recorded == 2


def test_other_memory_at_the_same_address_is_noticed() -> None:
    """`p.data = p.data * 2`, twice, may end where it began, and raises no version."""
    memory = numpy.full((1, 4), 3.0, numpy.float32)
    step = Derived(Parameter(torch.from_numpy(memory), requires_grad=False))
    step.check(3.0)
    step.w.data = step.w.data * 2
    memory[:] = 12
    step.w.data = torch.from_numpy(memory)
    step.check(12.0)
    assert step.recorder.recorded == 2


def test_refresh_makes_a_capture_look_again() -> None:
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(4):
        check(step, cache, twin, at, w)
    w.data.mul_(2)  # no version tells
    step.graphs.binder.store.forget()
    refresh()
    for at in range(4):
        check(step, cache, twin, at, w)
    assert step.recorder.recorded == 2


def test_results_are_memory_of_their_own_in_every_replay() -> None:
    """Also where nobody holds the last one: its memory may be waiting for another stream."""
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(4):
        results = check(step, cache, twin, at, w)
        own = {t.untyped_storage().data_ptr() for t in results}
        (capture,) = step.graphs.captured.values() if step.graphs.captured else (None,)
        inside = [t.untyped_storage().data_ptr() for t in capture.results] if capture else []
        assert own.isdisjoint(inside)
        del results


def test_sizes_are_part_of_the_key_where_they_may_differ() -> None:
    step, w, cache, twin = Step(symbolic=True), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(4):
        for size in (1, 2):
            check(step, cache, twin, at, w, size)
    assert step.recorder.recorded == 2


def test_numbers_tell_the_sizes_where_there_are_any() -> None:
    """As Dynamo passes them: a symbol's value beside the tensors that have it as a size."""
    recorder = Rerun()
    graphs = capturing(lambda n, x: [x * n], Layout([0, 1], [], True), Binder([], {}, WeightStore()), recorder)
    Step.caches = []
    for _ in range(4):
        for n in (2, 3):
            x = torch.randn(n)
            torch.testing.assert_close(graphs((n, x))[0], x * n)
    assert recorder.recorded == 2


def test_inputs_that_stay_are_read_where_they_lie_until_one_moves() -> None:
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    at, x = torch.zeros(1, dtype=torch.int64), torch.zeros(2, 4)

    def call(given: torch.Tensor, number: int) -> None:
        at.fill_(number)
        given.copy_(torch.randn(2, 4))
        Step.caches = [cache]
        results = step.graphs((given, cache, at, w))
        for got, want in zip(results, expected(given, twin, number, w), strict=True):
            torch.testing.assert_close(got, want)

    for number in range(5):
        call(x, number)
    (capture,) = step.graphs.captured.values()
    assert not capture.moving and step.recorder.recorded == 1
    others = [torch.zeros(2, 4) for _ in range(5)]
    for number, other in enumerate(others):
        call(other, number)
    (capture,) = step.graphs.captured.values()
    assert len(capture.moving) == 2 and step.recorder.recorded == 2
    call(x, 1)
    assert step.recorder.recorded == 2


def test_expanded_inputs_are_copied_once() -> None:
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(5):
        x = torch.randn(1, 4).expand(3, 4)
        got, want = step(x, cache, at, w), expected(x, twin, at, w)
        torch.testing.assert_close(got[1], want[1])
    assert step.recorder.recorded == 1


def test_captures_do_not_outlive_their_weights() -> None:
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(2):
        check(step, cache, twin, at, w)
    assert step.graphs.captured
    del w
    gc.collect()
    assert not step.graphs.captured


def test_the_number_of_captures_is_bounded() -> None:
    step, w = Step(), weight()
    kept = [torch.zeros(8) for _ in range(graphs.CAPTURES + 3)]
    for cache in kept:
        twin = torch.zeros(8)
        for at in range(3):
            check(step, cache, twin, at, w)
    assert len(step.graphs.captured) == graphs.CAPTURES


def test_large_inputs_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "COPIED", 8)
    step, w, cache, twin = Step(), weight(), torch.zeros(8), torch.zeros(8)
    for at in range(5):
        check(step, cache, twin, at, w)
    assert step.recorder.recorded == 0 and step.plain_calls == 5


def test_large_results_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Rerun()
    runner = capturing(lambda x: [x.repeat(100)], Layout([0]), Binder([], {}, WeightStore()), recorder)
    monkeypatch.setattr(graphs, "COPIED", 64)
    for n in range(6):
        assert runner((torch.full((4,), float(n)),))[0].tolist() == [n] * 400
    assert recorder.recorded == 0 and len(runner.large) == 1 and runner.refusal is None


def test_results_that_share_memory_are_never_captured() -> None:
    def run(x: torch.Tensor) -> list[torch.Tensor]:
        y = x * 2
        return [y, y[1:]]

    runner = capturing(run, Layout([0]), Binder([], {}, WeightStore()), Rerun())
    for _ in range(5):
        whole, part = runner((torch.ones(3),))
        part.zero_()
        assert whole.tolist() == [2, 0, 0]
    assert runner.refusal == "two results share memory"


def test_a_result_that_is_an_input_is_never_captured() -> None:
    binder = Binder([], {}, WeightStore())
    runner = capturing(lambda cache, x: [cache.add_(x)], Layout([0, 1], [0]), binder, Rerun())
    cache = torch.zeros(4)
    Step.caches = [cache]
    for n in range(1, 6):
        (result,) = runner((cache, torch.ones(4)))
        assert result is cache and cache[0] == n
    assert runner.refusal == "a result shares memory with an input"


def test_what_cannot_be_recorded_runs_plainly_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Rerun):
        def record(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    runner = capturing(lambda x: [x + 1], Layout([0]), Binder([], {}, WeightStore()), Refusing())
    for n in range(5):
        assert runner((torch.full((2,), float(n)),))[0].tolist() == [n + 1, n + 1]
    assert runner.refusal == "operation not permitted when stream is capturing"
    assert len(caplog.records) == 1 and "cannot be captured" in caplog.text
