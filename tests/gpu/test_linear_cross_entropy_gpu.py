"""Fused losses on a GPU: against float64 and PyTorch's own, without a wait for the GPU, and through a training step."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fuseline import backend
from fuseline.compiler.ops import attention, linear_cross_entropy
from fuseline.runtime import linear_cross_entropy as runs
from fuseline.runtime.deferred import Deferred

pytestmark = pytest.mark.gpu
WORDS = ("none", "mean", "sum")


def norm(a: torch.Tensor, truth: torch.Tensor) -> float:
    return ((a.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def eager(x: torch.Tensor, w: torch.Tensor, b: Any, t: torch.Tensor, how: int, smoothing: float, cap: float) -> Any:
    logits = F.linear(x, w, b)
    logits = torch.tanh(logits / cap) * cap if cap else logits
    wide = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.cross_entropy(wide, t, reduction=WORDS[how], label_smoothing=smoothing)


def rounding(side: list[torch.Tensor], t: torch.Tensor, how: int, smoothing: float, cap: float, dtype: Any) -> float:
    """The standard deviation of a reduced loss whose logits, and nothing else, are rounded to a type of 16 bits.

    A rounding is off by up to half a step, evenly, so that its variance is step²/12; a loss's derivative by a logit
    takes it on. One number is one draw of that: by luck it may be nearer to the truth than one that was rounded less.
    """
    with torch.no_grad():
        raw = F.linear(*side)
        logits = torch.tanh(raw / cap) * cap if cap else raw
        slope = logits.softmax(-1) - smoothing / raw.shape[-1]
        slope.scatter_add_(-1, t.clamp_min(0)[:, None], torch.full_like(raw[:, :1], smoothing - 1))
        slope *= 1 - (logits / cap).square() if cap else 1
        step = torch.finfo(dtype).eps * torch.exp2(torch.frexp(raw).exponent.double() - 1)
        kept = t != -100
        deviation = ((slope * step).square() / 12).sum(-1)[kept].sum().sqrt()
    return (deviation / (kept.sum() if how == 1 else 1)).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("how", "smoothing", "cap"), itertools.product((0, 1, 2), (0.0, 0.1), (0.0, 30.0)))
@pytest.mark.parametrize("shape", [(300, 64, 1000), (257, 128, 32003), (64, 96, 128256)], ids=str)
def test_no_worse_than_eager(shape: Any, how: int, smoothing: float, cap: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n, h, v = shape
    x, w, b = (torch.randn(*s, device="cuda").to(dtype) for s in ((n, h), (v, h), (v,)))
    target = torch.randint(0, v, (n,), device="cuda")
    target[::7] = -100
    sides = [[t.detach().to(d).requires_grad_() for t in (x, w, b)] for d in (torch.float64, dtype, dtype)]
    truth, theirs = (eager(*side, target, how, smoothing, cap) for side in sides[:2])
    made = torch.float32 if dtype.itemsize < 4 else None
    ours = linear_cross_entropy(*sides[2], target, None, how, -100, smoothing, 1.0, cap, made, 100)
    above = 1.7 * torch.rand(truth.shape, device="cuda", dtype=torch.float64) + 0.1
    least = chance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.0)
    if dtype.itemsize < 4 and how:
        chance = 1e-6 + 4 * rounding(sides[0], target, how, smoothing, cap, dtype) / truth.item()
    assert norm(ours, truth) <= max(1.05 * norm(theirs, truth), chance)
    gradients = [
        torch.autograd.grad(loss, side, above.to(loss.dtype))
        for loss, side in zip((truth, theirs, ours), sides, strict=True)
    ]
    for exact, other, found in zip(*gradients, strict=True):
        assert norm(found, exact) <= max(1.05 * norm(other, exact), least)


def test_nothing_waits_for_the_gpu_and_no_logits_are_stored() -> None:
    n, h, v = 8192, 256, 65536
    x, w = (torch.randn(*s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in ((n, h), (v, h)))
    target = torch.randint(0, v, (n,), device="cuda")
    step = lambda: linear_cross_entropy(x, w, None, target, None, 1, -100, 0.0, 1.0, 0.0, torch.float32, 512).backward()
    step()  # compiles the kernel
    x.grad = w.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    used = torch.cuda.max_memory_allocated() - before
    assert used < n * v * 2 / 2  # eager's logits in bfloat16 alone are twice that


def test_sums_over_chunks_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product that adds to a float32 matrix in place (cuBLAS, beta = 1) keeps what is there."""
    torch.manual_seed(0)
    a, b = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((512, 300), (300, 128)))
    total = torch.randn(512, 128, device="cuda")
    expected = total.double() + a.double() @ b.double()
    runs._add_product(total, a, b)
    assert norm(total, expected) < 1e-6
    out = torch.full((512, 128), float("nan"), device="cuda")
    runs._product(a, b, out)
    assert norm(out, a.double() @ b.double()) < 1e-6


def test_a_captured_graph_replays_it() -> None:
    x, w = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((300, 64), (5000, 64)))
    target = torch.randint(0, 5000, (300,), device="cuda")
    arguments = (x, w, None, target, None, 1, -100, 0.0, 1.0, 0.0, torch.float32, 100)
    expected = linear_cross_entropy(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = linear_cross_entropy(*arguments)
    loss.zero_()
    graph.replay()
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_grouped_attention_never_stores_its_weights(dtype: torch.dtype, masked: bool) -> None:
    """Shared heads go to a fused kernel in every type, forward and backward."""
    q, k = (torch.randn(1, h, 4096, 64, device="cuda", dtype=dtype, requires_grad=True) for h in (8, 2))
    mask = (torch.rand(1, 1, 1, 4096, device="cuda") > 0.1).index_fill(3, torch.tensor([0], device="cuda"), True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention(q, k, k, mask if masked else None, 0.125, "causal").float().sum().backward()
    weights = 8 * 4096 * 4096 * q.element_size()
    assert torch.cuda.max_memory_allocated() - before < weights / 2


def build(dtype: torch.dtype) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=8192, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to("cuda", dtype).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_step_by_default_is_inductors(dtype: torch.dtype) -> None:
    torch.compiler.reset()
    backend.recent.clear()
    model = build(dtype)
    exact, twin = copy.deepcopy(model).double(), copy.deepcopy(model)
    ids = torch.randint(0, 8192, (2, 256), device="cuda")
    compiled = torch.compile(twin, backend="fuseline")
    outs = [each(ids, labels=ids, use_cache=False) for each in (exact, model, compiled)]
    for out in outs:
        out.loss.backward()
    assert isinstance(outs[2].logits, Deferred) and backend.recent[-1].target == "inductor"
    assert backend.recent[-1].report["fuse-loss"].rules == {"LinearCrossEntropy": 1}
    for truth, other, found in zip(*(m.parameters() for m in (exact, model, twin)), strict=True):
        assert norm(found.grad, truth.grad) <= max(1.5 * norm(other.grad, truth.grad), 2e-5)
    assert torch.allclose(outs[2].logits.float(), outs[1].logits.float(), atol=5e-2, rtol=5e-2)


def test_other_lengths_and_autocast() -> None:
    torch.compiler.reset()
    model = build(torch.float32)
    compiled = torch.compile(copy.deepcopy(model), backend="fuseline")
    for length in (64, 96, 200):
        ids = torch.randint(0, 8192, (1, length), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            expected, found = (m(ids, labels=ids, use_cache=False).loss for m in (model, compiled))
        found.backward()
        assert abs(found - expected) < 2e-2 * expected
