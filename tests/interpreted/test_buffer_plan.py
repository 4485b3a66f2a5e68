"""Programs in an arena give bit for bit what they give with memory of their own, whatever lay in it before."""

from __future__ import annotations

import threading

import pytest
import torch

import fuseline
from fuseline.runtime import arena
from fuseline.runtime.arena import Plan
from fuseline.runtime.packing import peak

transformers = pytest.importorskip("transformers")
PIPELINES = ("raise,fuse",)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(arena, "_local", threading.local())


def poison() -> None:
    """All of this thread's arenas, NaN in every floating type."""
    for memory in arena._arenas().values():
        memory.fill_(255)


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model():
    return {pipeline: fuseline.optimize(tiny(), pipeline, target="triton", dynamic=True) for pipeline in PIPELINES}


@torch.no_grad()
def logits(model: torch.nn.Module, length: int) -> torch.Tensor:
    return model(input_ids=torch.arange(length)[None] % 64, use_cache=False).logits


def plan_of(model: torch.nn.Module) -> Plan:
    compilation = fuseline.reports(model)[0]
    return compilation.executable.run.__globals__["PLAN"]


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_program_in_an_arena_is_the_same_program(pipeline, model, monkeypatch):
    lengths = (3, 2, 3)
    kept = []
    for length in lengths:
        poison()
        result = logits(model[pipeline], length)
        kept.append((result, result.clone()))
    assert arena.held() and len(plan_of(model[pipeline]).sizes(5)) > 4
    monkeypatch.setattr(Plan, "__call__", lambda self, like, *sizes: (None,) * len(self.sizes(*sizes)))
    for length, (result, copy) in zip(lengths, kept, strict=True):
        assert torch.equal(result, copy)  # later calls did not touch what an earlier one gave back
        assert torch.equal(result, logits(model[pipeline], length))
        assert not result.isnan().any()


@pytest.mark.slow
def test_the_arena_is_smaller_than_the_sum_and_at_least_the_peak(model):
    logits(model["raise,fuse"], 5)
    lifetimes, _, total = plan_of(model["raise,fuse"]).layout(5)
    assert peak(lifetimes) <= total < sum(x.size for x in lifetimes)


class Blocks(torch.nn.Module):
    """Residual blocks: norm → linear → gelu → linear → add, and a result that is also read on."""

    def __init__(self):
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(16) for _ in range(2))
        self.up = torch.nn.ModuleList(torch.nn.Linear(16, 32) for _ in range(2))
        self.down = torch.nn.ModuleList(torch.nn.Linear(32, 16) for _ in range(2))

    def forward(self, x):
        kept = []
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(torch.nn.functional.gelu(up(norm(x))))
            kept.append(x.flip(0))
        return x, kept[0], x[1:].t()


@torch.no_grad()
def test_blocks_in_poisoned_memory(monkeypatch):
    torch.manual_seed(0)
    plain, inputs = Blocks().eval(), [torch.randn(n, 16) for n in (3, 2, 3)]
    expected = [plain(x) for x in inputs]
    model = fuseline.optimize(plain, target="triton", dynamic=True)
    found = []
    for x in inputs:
        poison()
        found.append([(r, r.clone()) for r in model(x)])
    assert arena.held() and len(plan_of(model).sizes(3)) >= 3
    for reference, results in zip(expected, found, strict=True):
        for eager, (result, copy) in zip(reference, results, strict=True):
            assert torch.equal(result, copy)  # later calls did not touch what an earlier one gave back
            torch.testing.assert_close(result, eager, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(Plan, "__call__", lambda self, like, *sizes: (None,) * len(self.sizes(*sizes)))
    for x, results in zip(inputs, found, strict=True):
        assert all(torch.equal(a, b) for a, (b, _) in zip(model(x), results, strict=True))
