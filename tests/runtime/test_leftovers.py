"""A leftover region runs through PyTorch or Inductor, whichever was faster; nothing that goes wrong fails a call."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fuseline
from fuseline.codegen.leftovers import gather, identity
from fuseline.compiler.errors import UserError
from fuseline.runtime import leftovers
from fuseline.runtime.cache import Cache
from fuseline.runtime.leftovers import Compiled, Leftover, install
from fuseline.runtime.stopwatch import Times, both
from tests.codegen.test_leftovers import Block, captured, function

SLOW, FAST = Times(2.0, 1.0, 2.0, 1.0), Times(1.0, 0.99, 1.0, 1.0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(leftovers, "_shared", {})


@pytest.fixture
def program():
    return captured(Block(), torch.randn(2, 4, 8, 8))


class Made:
    """A leftover over a region's graph, with a compilation of the test's own, and what was called."""

    def __init__(self, region, monkeypatch, tmp_path, times=SLOW, run=None, holds=None, always=False):
        self.calls, self.compilations, self.measured, self.refusals = [], 0, 0, {}

        def compiled(module):
            self.compilations += 1
            if isinstance(run, Exception):
                raise run
            return Compiled(self.recorded("inductor", run or region), holds)

        def timed(plain, inductor, device):
            self.measured += 1
            return times

        monkeypatch.setattr(leftovers, "_through_inductor", compiled)
        monkeypatch.setattr(leftovers, "both", timed)
        self.function = Leftover(
            "run", self.recorded("plain", region), region, self.refusals, Cache(tmp_path / "cache"), always
        )

    def recorded(self, name, code):
        def call(*arguments):
            self.calls.append(name)
            return code(*arguments)

        return call

    def __call__(self, *arguments):
        del self.calls[:]
        return self.function(*arguments)


def region_of(program):
    (name,) = gather(program)
    region = program.module.get_submodule(name)
    arguments = [torch.rand(n.meta["val"].shape) for n in region.graph.find_nodes(op="placeholder")]
    return region, arguments


def test_the_faster_one_runs_from_the_second_call_on(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    made = Made(region, monkeypatch, tmp_path)
    expected = region(*arguments)
    for _ in range(2):
        assert torch.equal(made(*arguments), expected)
    assert made.calls == ["inductor"] and made.measured == made.compilations == 1 and not made.refusals


def test_a_gain_of_less_than_three_percent_is_none(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    made = Made(region, monkeypatch, tmp_path, times=FAST)
    made(*arguments), made(*arguments)
    assert made.calls == ["plain"] and made.measured == 1


def test_a_gain_on_the_gpu_that_the_host_pays_for_is_none(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    made = Made(region, monkeypatch, tmp_path, times=Times(2.0, 1.0, 2.0, 2.3))
    made(*arguments), made(*arguments)
    assert made.calls == ["plain"]


@pytest.mark.parametrize("times", [SLOW, FAST])
def test_the_next_process_does_not_measure_again(program, monkeypatch, tmp_path, times):
    region, arguments = region_of(program)
    Made(region, monkeypatch, tmp_path, times=times)(*arguments)
    monkeypatch.setattr(leftovers, "_shared", {})
    again = Made(region, monkeypatch, tmp_path, times=FAST if times is SLOW else SLOW)
    again(*arguments)
    assert again.calls == ["inductor" if times is SLOW else "plain"]
    assert again.measured == 0 and again.compilations == (1 if times is SLOW else 0)


def test_a_damaged_choice_is_measured_again(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    Made(region, monkeypatch, tmp_path)(*arguments)
    (path,) = (tmp_path / "cache").rglob("choice.json")
    assert json.loads(path.read_text())["chosen"] is True
    path.write_text("{")
    monkeypatch.setattr(leftovers, "_shared", {})
    again = Made(region, monkeypatch, tmp_path)
    again(*arguments)
    assert again.measured == 1


def test_equal_regions_share_one_compilation_and_one_choice(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    made = Made(region, monkeypatch, tmp_path)
    twin = Leftover("twin", region, region, {}, Cache(tmp_path / "cache"))
    made(*arguments), twin(*arguments)
    assert made.compilations == made.measured == 1


def test_an_error_of_the_compiler_is_a_reason_and_not_a_failure(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    made = Made(region, monkeypatch, tmp_path, run=RuntimeError("no such lowering\nmore"))
    twin = Leftover("twin", region, region, refusals := {}, Cache(tmp_path / "cache"))
    assert torch.equal(made(*arguments), region(*arguments))
    assert torch.equal(twin(*arguments), region(*arguments))
    assert made.refusals == {"run": "Inductor: RuntimeError: no such lowering"} and made.compilations == 1
    assert refusals == {"twin": made.refusals["run"]}
    assert not list((tmp_path / "cache").rglob("choice.json"))  # the next version may do better


def test_an_error_while_it_runs_is_one_too(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    broken = []

    def run(*given):
        if broken:
            raise AssertionError("expected stride")
        return region(*given)

    made = Made(region, monkeypatch, tmp_path, run=run)
    made(*arguments)
    broken.append(True)
    assert torch.equal(made(*arguments), region(*arguments))
    assert made.calls == ["inductor", "plain"] and "expected stride" in made.refusals["run"]
    made(*arguments)
    assert made.calls == ["plain"]


def test_a_result_of_another_layout_is_refused(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    made = Made(region, monkeypatch, tmp_path, run=lambda *a: region(*a).contiguous(memory_format=torch.channels_last))
    result = made(*arguments)
    assert result.is_contiguous() and "Inductor gives" in made.refusals["run"]


def test_sizes_that_the_compilation_does_not_hold_for_run_plainly(monkeypatch, tmp_path):
    model = Block().eval()
    dynamic = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    after, _ = fuseline.Pipeline("fuse").run(fuseline.capture(model, (torch.randn(4, 4, 8, 8),), {}, dynamic))
    module, _ = after.lift()
    region, arguments = region_of_symbolic(replace(after, module=module), 4)
    made = Made(region, monkeypatch, tmp_path, holds=lambda given: given[0].shape[0] % 2 == 0)
    assert made.function.sizes == ((0, 0),)
    for batch, expected in ((4, "inductor"), (6, "inductor"), (5, "plain"), (40, "inductor"), (4, "inductor")):
        arguments[0] = torch.randn(batch, 4, 8, 8)
        assert made(*arguments).shape[0] == batch and made.calls[-1] == expected
    assert made.measured == 2  # up to 7, and up to 63


def region_of_symbolic(program, batch):
    (name,) = gather(program)
    region = program.module.get_submodule(name)
    shapes = [n.meta["val"].shape for n in region.graph.find_nodes(op="placeholder")]
    return region, [torch.rand([s if isinstance(s, int) else batch for s in shape]) for shape in shapes]


def test_nothing_is_chosen_while_a_step_is_recorded(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    made = Made(region, monkeypatch, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        made(*arguments)
    assert made.calls == ["plain"] and made.compilations == 0
    made(*arguments)
    assert made.compilations == 1


def test_many_threads_compile_once(program, monkeypatch, tmp_path):
    region, arguments = region_of(program)
    made = Made(region, monkeypatch, tmp_path)
    threads = [threading.Thread(target=made.function, args=arguments) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.compilations == made.measured == 1


def test_installing_twice_keeps_the_first(program):
    region, _ = region_of(program)
    module = SimpleNamespace(run_inductor_0=region)
    first = install(module, {"run_inductor_0": region}, {})["run_inductor_0"]
    assert install(module, {"run_inductor_0": region}, {})["run_inductor_0"] is first is module.run_inductor_0


def test_the_stopwatch_knows_the_slower_one():
    small, large = torch.randn(8, 8), torch.randn(200, 200)
    times = both(lambda: large @ large @ large @ large, lambda: small + 1, torch.device("cpu"))
    assert times.inductor < times.plain and times.plain == times.plain_launched


def test_an_unknown_choice_is_an_error_at_once():
    with pytest.raises(UserError, match="leftovers cannot be 'indcutor'") as raised:
        fuseline.optimize(nn.Linear(2, 2), leftovers="indcutor")
    assert "inductor" in str(raised.value)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("symbolic", [False, True])
def test_inductor_itself(tmp_path, symbolic):
    model = Block().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    dynamic = {"x": {0: batch}} if symbolic else None
    after, _ = fuseline.Pipeline("fuse").run(fuseline.capture(model, (torch.randn(4, 4, 8, 8),), {}, dynamic))
    module, _ = after.lift()
    region, arguments = region_of_symbolic(replace(after, module=module), 4)
    made = Leftover("run", region, region, refusals := {}, Cache(tmp_path), always=True)
    with torch.no_grad():
        for size in (4, 4, 7, 2) if symbolic else (4, 4):
            arguments[0] = torch.randn(size, 4, 8, 8)
            expected = region(*arguments)
            torch.testing.assert_close(made(*arguments), expected, rtol=1e-4, atol=1e-4)
    assert not refusals and all(run is not region for run in made.known.values())


def test_a_region_reads_no_more_than_its_graph(program):
    region, _ = region_of(program)
    assert identity(region) == region.meta["identity"]
    code = captured(function(lambda x: x.cumsum(0).flip(0)), torch.randn(3, 3))
    assert code.module.get_submodule(gather(code)[0]).meta["identity"] != region.meta["identity"]


def test_optimize_hands_leftovers_over_and_says_what_became_of_them(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # no kernel of ours is launched here
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)

    def fails(region):
        raise NotImplementedError("not on this machine")

    monkeypatch.setattr(leftovers, "_through_inductor", fails)
    with torch.no_grad():
        expected = model(x)
        fuseline.optimize(model, target="triton", leftovers="inductor")
        assert torch.equal(model(x), expected)
    (compilation,) = fuseline.reports(model)
    assert compilation.refusals == {"run_inductor_0": "Inductor: NotImplementedError: not on this machine"}
    assert list(compilation.leftovers) == ["run_inductor_0"]


def test_without_a_gpu_nothing_is_measured(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    with torch.no_grad():
        fuseline.optimize(model, target="triton")(torch.randn(2, 3, 8, 8))
    assert fuseline.reports(model)[0].leftovers == {}
