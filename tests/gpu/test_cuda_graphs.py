"""Captured decode steps on a GPU: the tokens of eager, results that stay, weights that change."""

from __future__ import annotations

import copy
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import fuseline
from fuseline.runtime import native
from fuseline.runtime.results import in_cpp

pytestmark = pytest.mark.gpu
transformers = pytest.importorskip("transformers")
QUANTIZED = "raise,quantize{weights=int8},fuse"
PIPELINES = ("raise,fuse", QUANTIZED)


@pytest.fixture(scope="module", autouse=True)
def compilations() -> Iterator[None]:
    """All models here share one `forward`, whose compilations Dynamo counts together."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch.compiler.reset()


def llama(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=512, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).cuda().eval()


@dataclass
class Pair:
    """A model whose steps are captured, and what it is compared with: the same in eager. Compiling takes most of the
    time here, so the tests of one pipeline share a pair, and whoever edits one edits both."""

    compiled: Any
    reference: Any

    def forget(self) -> None:
        """What is generated next is captured afresh."""
        for compilation in fuseline.reports(self.compiled):
            if compilation.executable.graphs:
                compilation.executable.graphs.captured.clear()
                compilation.executable.graphs.latest = None


@pytest.fixture(scope="module")
def pair() -> Callable[[str], Pair]:
    @functools.cache
    def made(pipeline: str) -> Pair:
        compiled, reference = fuseline.optimize(llama(), pipeline), llama()
        if pipeline == QUANTIZED:
            fuseline.optimize(reference, pipeline, target="eager")
        return Pair(compiled, reference)

    return made


def generate(model: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 24, "do_sample": False, "cache_implementation": "static", **settings}
    return model.generate(ids, disable_compile=True, **settings)


def captures(model: Any) -> int:
    graphs = [c.executable.graphs for c in fuseline.reports(model) if c.executable.graphs]
    return sum(capture.replay is not None for g in graphs for capture in g.captured.values())


def refusals(model: Any) -> list[str]:
    graphs = [c.executable.graphs for c in fuseline.reports(model) if c.executable.graphs]
    return [g.refusal for g in graphs if g.refusal]


def test_captures_after_all_others_are_gone() -> None:
    """The first test: no other model holds captures yet."""
    model, ids = llama(layers=1), torch.randint(1, 320, (1, 6), device="cuda")
    want = generate(model, ids)
    for _ in range(2):
        compiled = fuseline.optimize(copy.deepcopy(model), "raise,fuse")
        assert torch.equal(generate(compiled, ids), want) and captures(compiled) and not refusals(compiled)
        del compiled
        torch.compiler.reset()
        gc.collect()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_tokens_of_eager_from_captured_steps(pair: Callable[[str], Pair], pipeline: str) -> None:
    models = pair(pipeline)
    for length, batch in ((7, 1), (7, 1), (12, 1), (5, 3)):
        ids = torch.randint(1, 320, (batch, length), device="cuda")
        assert torch.equal(generate(models.compiled, ids), generate(models.reference, ids))
    assert captures(models.compiled) >= 1 and not refusals(models.compiled)


def test_left_padding_and_sampling(pair: Callable[[str], Pair]) -> None:
    models = pair("raise,fuse")
    ids = torch.randint(1, 320, (3, 9), device="cuda")
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    got, want = (generate(x, ids, attention_mask=mask) for x in (models.compiled, models.reference))
    assert torch.equal(got, want)
    outputs = []
    for candidate in (models.reference, models.compiled):
        torch.manual_seed(3)
        outputs.append(generate(candidate, ids, attention_mask=mask, do_sample=True, temperature=0.7))
    assert torch.equal(*outputs)


def test_kept_logits_do_not_change(pair: Callable[[str], Pair]) -> None:
    models = pair("raise,fuse")
    models.forget()
    ids = torch.randint(1, 320, (1, 6), device="cuda")
    settings = {"output_logits": True, "return_dict_in_generate": True}
    got, want = (generate(x, ids, **settings) for x in (models.compiled, models.reference))
    assert captures(models.compiled)
    for a, b in zip(got.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)


def test_results_may_be_read_on_another_stream(pair: Callable[[str], Pair]) -> None:
    """As PyTorch has it: `record_stream`, and the result may be let go of while that stream is yet to read it."""
    models = pair("raise,fuse")
    models.forget()
    inputs = [torch.randint(1, 320, (1, 6), device="cuda") for _ in range(8)]
    side, copies = torch.cuda.Stream(), []
    with torch.no_grad():
        want = [models.reference(ids, use_cache=False).logits for ids in inputs]
        for ids in inputs:
            logits = models.compiled(ids, use_cache=False).logits
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)  # about 10 ms: the next replay is over before
                copies.append(logits.clone())
            logits.record_stream(side)
            del logits
    torch.cuda.synchronize()
    assert captures(models.compiled)
    for got, expected in zip(copies, want, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_copies_of_results_are_made_on_their_stream_from_the_allocator() -> None:
    x, side = torch.zeros(1 << 20, device="cuda"), torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        copies = in_cpp([x, 7], stream.cuda_stream)
        assert copies is not None, "the driver is there"
        kept = []
        with torch.cuda.stream(stream):
            for n in range(10):
                x.fill_(n)
                torch.cuda._sleep(1_000_000)
                kept.append(copies())
        torch.cuda.synchronize()
        assert [(a.unique().tolist(), b) for a, b in kept] == [([n], 7) for n in range(10)]
        held = torch.cuda.memory_allocated()
        del kept
        assert torch.cuda.memory_allocated() <= held - 10 * 4 * x.numel()


def test_copies_of_results_in_another_thread_and_without_memory() -> None:
    x = torch.arange(1 << 24, device="cuda")
    copies = in_cpp(x, torch.cuda.current_stream().cuda_stream)
    assert copies is not None
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(copies()))
    thread.start()
    thread.join()
    assert torch.equal(found.pop(), x)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            copies()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(copies(), x)


@pytest.mark.parametrize("checks", ["C++", "Python"])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_edited_weights_are_seen_by_captured_steps(
    pair: Callable[[str], Pair], pipeline: str, checks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if checks == "Python":
        monkeypatch.setattr(native, "module", lambda name: None)
    assert (native.module("watch") is None) == (checks == "Python")
    models = pair(pipeline)
    models.forget()
    ids = torch.randint(1, 320, (1, 6), device="cuda")
    before = generate(models.compiled, ids)
    assert captures(models.compiled)
    for candidate in (models.reference, models.compiled):
        with torch.no_grad():
            candidate.model.layers[1].mlp.down_proj.weight.mul_(-2)
            candidate.lm_head.weight.data = candidate.lm_head.weight.data.flip(0).clone()
    after = generate(models.compiled, ids)
    assert torch.equal(after, generate(models.reference, ids)) and not torch.equal(after, before)


def test_memory_of_captures_is_bounded(pair: Callable[[str], Pair]) -> None:
    compiled = pair("raise,fuse").compiled
    ids = torch.randint(1, 320, (1, 6), device="cuda")
    for _ in range(3):
        generate(compiled, ids)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        generate(compiled, ids)
    assert torch.cuda.memory_allocated() <= before + (1 << 20)


def test_switched_off() -> None:
    compiled = fuseline.optimize(llama(layers=1), "raise,fuse", cuda_graphs=False)
    generate(compiled, torch.randint(1, 320, (1, 6), device="cuda"), max_new_tokens=4)
    assert fuseline.reports(compiled) and all(c.executable.graphs is None for c in fuseline.reports(compiled))


@torch.library.custom_op("fuseline_tests::waits", mutates_args=())
def waits_for_the_gpu(x: torch.Tensor) -> torch.Tensor:
    return x + x.sum().item()


@waits_for_the_gpu.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_what_cannot_be_captured_runs_and_says_so(
    pair: Callable[[str], Pair], caplog: pytest.LogCaptureFixture
) -> None:
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
    models = pair("raise,fuse")
    models.forget()
    ids = torch.randint(1, 320, (1, 6), device="cuda")
    assert torch.equal(generate(models.compiled, ids), generate(models.reference, ids)) and captures(models.compiled)
