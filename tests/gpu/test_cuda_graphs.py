"""Captured decode steps on a GPU: the tokens of eager, results that stay, weights that change."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch

import fuseline
from fuseline.runtime import native

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    torch.compiler.reset()
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).cuda().eval()


def generate(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static", **settings}
    return model.generate(ids, disable_compile=True, **settings)


def captures(model: Any) -> int:
    graphs = [c.executable.graphs for c in fuseline.reports(model) if c.executable.graphs]
    return sum(capture.replay is not None for g in graphs for capture in g.captured.values())


def refusals(model: Any) -> list[str]:
    graphs = [c.executable.graphs for c in fuseline.reports(model) if c.executable.graphs]
    return [g.refusal for g in graphs if g.refusal]


@pytest.mark.parametrize("pipeline", ["raise,fuse", "raise,quantize{weights=int8},fuse"])
def test_tokens_of_eager_from_captured_steps(model: Any, pipeline: str) -> None:
    plain = fuseline.optimize(copy.deepcopy(model), pipeline, target="eager") if "int8" in pipeline else model
    compiled = fuseline.optimize(copy.deepcopy(model), pipeline)
    for length, batch in ((7, 1), (7, 1), (12, 1), (5, 3)):
        ids = torch.randint(1, 320, (batch, length), device="cuda")
        assert torch.equal(generate(compiled, ids), generate(plain, ids))
    assert captures(compiled) >= 1 and not refusals(compiled)


def test_left_padding_and_sampling(model: Any) -> None:
    compiled = fuseline.optimize(copy.deepcopy(model), "raise,fuse")
    ids = torch.randint(1, 320, (2, 9), device="cuda")
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    assert torch.equal(generate(compiled, ids, attention_mask=mask), generate(model, ids, attention_mask=mask))
    outputs = []
    for candidate in (model, compiled):
        torch.manual_seed(3)
        outputs.append(generate(candidate, ids, attention_mask=mask, do_sample=True, temperature=0.7))
    assert torch.equal(*outputs)


def test_kept_logits_do_not_change(model: Any) -> None:
    compiled = fuseline.optimize(copy.deepcopy(model), "raise,fuse")
    ids = torch.randint(1, 320, (1, 6), device="cuda")
    settings = {"output_logits": True, "return_dict_in_generate": True}
    got, want = generate(compiled, ids, **settings), generate(model, ids, **settings)
    assert captures(compiled)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_results_may_be_read_on_another_stream(model: Any) -> None:
    """As PyTorch has it: `record_stream`, and the result may be let go of while that stream is yet to read it."""
    compiled = fuseline.optimize(copy.deepcopy(model), "raise,fuse")
    inputs = [torch.randint(1, 320, (1, 6), device="cuda") for _ in range(8)]
    side, copies = torch.cuda.Stream(), []
    with torch.no_grad():
        want = [model(ids, use_cache=False).logits for ids in inputs]
        for ids in inputs:
            logits = compiled(ids, use_cache=False).logits
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)  # about 10 ms: the next replay is over before
                copies.append(logits.clone())
            logits.record_stream(side)
            del logits
    torch.cuda.synchronize()
    assert captures(compiled)
    for got, expected in zip(copies, want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("checks", ["C++", "Python"])
def test_edited_weights_are_seen_by_captured_steps(model: Any, checks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if checks == "Python":
        monkeypatch.setattr(native, "module", lambda name: None)
    assert (native.module("watch") is None) == (checks == "Python")
    for pipeline in ("raise,fuse", "raise,quantize{weights=int8},fuse"):
        original = copy.deepcopy(model)
        compiled = fuseline.optimize(copy.deepcopy(model), pipeline)
        ids = torch.randint(1, 320, (1, 6), device="cuda")
        generate(compiled, ids)
        for candidate in (original, compiled):
            with torch.no_grad():
                candidate.model.layers[1].mlp.down_proj.weight.mul_(-2)
                candidate.lm_head.weight.data = candidate.lm_head.weight.data.flip(0).clone()
        plain = fuseline.optimize(original, pipeline, target="eager") if "int8" in pipeline else original
        assert torch.equal(generate(compiled, ids), generate(plain, ids))


def test_memory_of_captures_is_bounded(model: Any) -> None:
    compiled = fuseline.optimize(model, "raise,fuse")
    ids = torch.randint(1, 320, (1, 6), device="cuda")
    for _ in range(3):
        generate(compiled, ids)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        generate(compiled, ids)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_switched_off(model: Any) -> None:
    compiled = fuseline.optimize(model, "raise,fuse", cuda_graphs=False)
    generate(compiled, torch.randint(1, 320, (1, 6), device="cuda"))
    assert all(c.executable.graphs is None for c in fuseline.reports(compiled))


@torch.library.custom_op("fuseline_tests::waits", mutates_args=())
def waits_for_the_gpu(x: torch.Tensor) -> torch.Tensor:
    return x + x.sum().item()


@waits_for_the_gpu.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_what_cannot_be_captured_runs_and_says_so(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Waits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return waits_for_the_gpu(self.inner(x))

    waits = Waits().cuda().eval()
    compiled = fuseline.optimize(copy.deepcopy(waits), "raise{allow_empty},fuse")
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(10, 64, device="cuda")
            torch.testing.assert_close(compiled(x), waits(x), atol=1e-3, rtol=1e-3)
    assert refusals(compiled) and "cannot be captured" in caplog.text
    torch.randn(3, device="cuda")  # the generator is none the worse
    ids = torch.randint(1, 320, (1, 6), device="cuda")
    later = fuseline.optimize(copy.deepcopy(model), "raise,fuse")
    assert torch.equal(generate(later, ids), generate(model, ids)) and captures(later)


def test_captures_after_all_others_are_gone(model: Any) -> None:
    ids = torch.randint(1, 320, (1, 6), device="cuda")
    want = generate(model, ids)
    for _ in range(2):
        compiled = fuseline.optimize(copy.deepcopy(model), "raise,fuse")
        assert torch.equal(generate(compiled, ids), want) and captures(compiled) and not refusals(compiled)
        del compiled
        torch.compiler.reset()
        gc.collect()
