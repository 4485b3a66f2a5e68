"""On a GPU: programs in an arena, on several streams and threads, in captures, and beside compiled leftovers."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fuseline
from fuseline.runtime import arena
from fuseline.runtime.arena import Plan
from tests.codegen.programs import demo_geometry
from tests.codegen.test_leftovers import Block

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def settings_of_dynamo():
    """PyTorch 2.11 has one set of Dynamo's settings for all threads: when two of them call what was compiled with
    `dynamic=True`, one may restore what the other had changed, and all that is compiled later has symbolic sizes."""
    before = torch._dynamo.config.assume_static_by_default
    yield
    torch._dynamo.config.assume_static_by_default = before


@pytest.fixture(scope="module")
def model():
    built = demo_geometry(vocabulary=512, dtype=torch.bfloat16).cuda()
    return fuseline.optimize(built, "raise,fuse", target="triton", dynamic=True, cuda_graphs=False)


@torch.no_grad()
def logits(model: nn.Module, length: int) -> torch.Tensor:
    return model(input_ids=torch.arange(length, device="cuda")[None] % 512, use_cache=False).logits


def plainly(model: nn.Module, length: int) -> torch.Tensor:
    original = Plan.__call__
    Plan.__call__ = lambda self, like, *sizes: (None,) * len(self.sizes(*sizes))
    try:
        return logits(model, length)
    finally:
        Plan.__call__ = original


def test_poisoned_memory_changes_nothing(model):
    kept = []
    for length in (7, 3, 7, 200, 1):
        for memory in arena._arenas().values():
            memory.fill_(255)
        result = logits(model, length)
        kept.append((length, result, result.clone()))
    for length, result, copy in kept:
        assert torch.equal(result, copy) and torch.equal(result, plainly(model, length))
    assert arena.held()


def test_streams_and_threads_have_memory_of_their_own(model):
    expected = {length: logits(model, length) for length in (5, 64)}
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(length: int, stream: torch.cuda.Stream | None) -> None:
        with torch.cuda.stream(stream):
            results = [logits(model, length) for _ in range(20)]
        torch.cuda.synchronize()
        wrong.extend(length for result in results if not torch.equal(result, expected[length]))

    threads = [threading.Thread(target=work, args=(n, s)) for n in expected for s in (None, torch.cuda.Stream())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    with torch.cuda.stream(torch.cuda.Stream()):
        logits(model, 5)
    assert len(arena.held()) >= 2


def test_a_capture_keeps_its_memory(model):
    ids = torch.arange(9, device="cuda")[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = model(input_ids=ids, use_cache=False).logits
    for _ in range(3):
        for memory in arena._arenas().values():
            memory.fill_(255)
        logits(model, 100)  # a plain call in between, in the arena
        ids.copy_(ids.flip(1))
        graph.replay()
        again = result.clone()
        with torch.no_grad():
            assert torch.equal(again, model(input_ids=ids, use_cache=False).logits)
    assert expected.shape == result.shape


@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True])
def test_leftovers_through_inductor(graphs, tmp_path, monkeypatch):
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path))
    torch.compiler.reset()
    model = nn.Sequential(Block(64), Block(64), nn.Flatten(2), nn.Linear(256, 32)).cuda().eval()
    x = torch.randn(4, 64, 16, 16, device="cuda")
    expected = model(x)
    fuseline.optimize(model, target="triton", leftovers="inductor", cuda_graphs=graphs)
    for _ in range(5):
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    (compilation,) = fuseline.reports(model)
    assert compilation.leftovers and not compilation.refusals
    assert all(x.shared.compiled.run is not None for x in compilation.leftovers.values())
    if graphs:
        assert compilation.executable.graphs.refusal is None and compilation.executable.graphs.captured
    torch.testing.assert_close(model(x[:3]), expected[:3], rtol=2e-2, atol=2e-2)  # another batch: symbolic now
    torch.testing.assert_close(model(x[:2]), expected[:2], rtol=2e-2, atol=2e-2)
    assert not fuseline.reports(model)[-1].refusals
