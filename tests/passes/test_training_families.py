"""Training steps of library models through the backend: eager's loss and gradients, no mask and no logits stored."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hypothesis import HealthCheck, given, settings, strategies as st

from fuseline import backend
from fuseline.compiler.deferred import cut
from fuseline.compiler.flatten import flatten
from fuseline.compiler.ops import linear_cross_entropy
from fuseline.runtime.deferred import Deferred
from tests.helpers.models import error
from tests.passes.families import FAMILIES

PIPELINE = "raise,fuse-loss{least=0},fuse"
LENGTH, VOCABULARY = 13, 112


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()
    backend.recent.clear()


def build(family: str, **changes: Any) -> torch.nn.Module:
    dropped = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if family == "gpt2" else {}
    model = FAMILIES[family].build(**{"vocab_size": VOCABULARY, **dropped, **changes}).train()
    model.config.use_cache = False
    model.loss_type = "ForCausalLM"  # GPT-2 has none, and says so in a way that ends Dynamo's graph
    return model


def batch(length: int = LENGTH, size: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (size, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < 4, -100)}


def step(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    out = model(**inputs)
    gradients = torch.autograd.grad(out.loss, list(model.parameters()))
    return out, list(gradients)


def worst(model: torch.nn.Module, compiled: torch.nn.Module, inputs: dict[str, Any]) -> float:
    """The largest error of loss and gradients; of small ones, relative to a tenth of the largest."""
    (expected, gradients), (out, found) = step(model, inputs), step(compiled, inputs)
    assert isinstance(out.logits, Deferred) and out.logits._value is None
    least = max(g.abs().max() for g in gradients) / 10
    pairs = zip(found, gradients, strict=True)
    errors = [((a - b).abs().max() / b.abs().max().clamp_min(least)).item() for a, b in pairs]
    return max(error(out.loss, expected.loss), *errors)


def compiled(model: torch.nn.Module, pipeline: str = PIPELINE, **options: Any) -> torch.nn.Module:
    twin = copy.deepcopy(model)
    twin.compile(backend="fuseline", options={"pipeline": pipeline, **options})
    return twin


def stored(kind: str) -> list[str]:
    """The values of the last graph, in plain ATen, with a side of queries and one of keys, or of tokens."""
    program = backend.recent[-1].program
    plain, _ = cut(flatten(program, program.lift()[0]))
    found = []
    for node in plain.graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        squares = value.shape[-2:] == (LENGTH, LENGTH)
        if squares if kind == "mask" else VOCABULARY in value.shape:
            found.append(node.format_node() or node.name)
    return found


@pytest.mark.one_in(4)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_a_step_is_eagers(family: str) -> None:
    model = build(family)
    assert worst(model, compiled(model), batch()) < 2e-6
    (one,) = backend.recent
    assert one.report["fuse-loss"].rules == {"LinearCrossEntropy": 1} and not one.report["fuse-loss"].refused
    assert not stored("logits")
    if family != "gemma2":  # a sliding window is a mask to PyTorch
        assert not stored("mask")
    (node,) = (n for n in one.program.graph.nodes if n.target is linear_cross_entropy.overload)
    assert node.args[9] == (30.0 if family == "gemma2" else 0.0)


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_in_float64(family: str) -> None:
    """transformers casts norms and the loss to float32 whatever the model's type."""
    model = build(family).double()
    assert worst(model, compiled(model), batch()) < 1e-6


@pytest.mark.slow
def test_other_lengths_are_one_more_graph() -> None:
    model = build("llama")
    twin = compiled(model)
    for length in (9, 14, 21, 6):
        assert worst(model, twin, batch(length)) < 2e-6
    assert len(backend.recent) == 2
    kinds = [n.args[3:6] for m in backend.recent[-1].program.module.children() if isinstance(m, torch.fx.GraphModule)
             for n in m.graph.nodes if n.target is torch.ops.fuseline.attention.default]  # fmt: skip
    assert kinds and all(mask is None and kind == "causal" for mask, _, kind in kinds)


def test_padded_batches() -> None:
    """Causal and padded is a mask; the loss is fused all the same, and rows of padding alone stay eager's."""
    model = build("llama")
    inputs = batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, :5] = 0
    inputs["labels"][0, :5] = -100
    assert worst(model, compiled(model), inputs) < 2e-6


@pytest.mark.parametrize("count", [torch.tensor(17), pytest.param(17, marks=pytest.mark.slow)], ids=["tensor", "int"])
def test_a_count_of_items_divides_the_sum(count: Any) -> None:
    """What the library's trainer passes when it accumulates gradients."""
    model = build("llama")
    assert worst(model, compiled(model), {**batch(), "num_items_in_batch": count}) < 2e-6


@pytest.mark.slow
def test_under_autocast() -> None:
    """The call stays PyTorch's and says is_causal; the head works in bfloat16, the loss in float32."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        (expected, gradients), (out, found) = step(model, batch()), step(compiled(model), batch())
    one = backend.recent[-1]
    assert one.report["raise"].rules == {"CausalCall": 2}
    assert one.report["fuse-loss"].rules == {"LinearCrossEntropy": 1} and not stored("mask")
    assert out.loss.dtype == expected.loss.dtype and out.logits.dtype == expected.logits.dtype == torch.bfloat16
    assert error(out.loss, expected.loss) < 1e-3 and error(out.logits, expected.logits) < 2e-2
    assert max(error(a, b) for a, b in zip(found, gradients, strict=True)) < 5e-2


@pytest.mark.slow
def test_what_a_trainer_wraps_around_a_model() -> None:
    """Autocast inside the graph, and results cast to float32, which puts the logits off once more."""
    accelerate = pytest.importorskip("accelerate.utils")

    def wrapped(model: torch.nn.Module) -> torch.nn.Module:
        inner = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
        model.forward = types.MethodType(accelerate.convert_outputs_to_fp32(inner), model)
        return model

    model = build("llama")
    twin = torch.compile(wrapped(copy.deepcopy(model)), backend="fuseline", options={"pipeline": PIPELINE})
    expected, out = wrapped(model)(**batch()), twin(**batch())
    assert isinstance(out.logits, Deferred) and out.logits._value is None and out.logits.dtype == torch.float32
    assert error(out.loss, expected.loss) < 1e-3
    assert error(out.logits, expected.logits) < 2e-2
    assert backend.recent[-1].report["raise"].rules == {"CausalCall": 2}


def test_a_frozen_head_and_a_trained_adapter() -> None:
    model = build("llama", tie_word_embeddings=False)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    twin = compiled(model)
    for each in (model, twin):
        each(**batch()).loss.backward()
    assert error(twin.model.norm.weight.grad, model.model.norm.weight.grad) < 2e-6
    assert twin.lm_head.weight.grad is None


def test_the_default_pipeline_fuses_large_vocabularies() -> None:
    model = build("llama", vocab_size=4096)
    twin = copy.deepcopy(model)
    twin.compile(backend="fuseline")
    assert worst(model, twin, batch()) < 2e-6
    assert backend.recent[-1].report["fuse-loss"].rules == {"LinearCrossEntropy": 1}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_through_inductor(family: str) -> None:
    model = build(family)
    assert worst(model, compiled(model, target="inductor"), batch()) < 5e-6


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    torch.compiler.reset()
    model = build("qwen3")
    twin = compiled(model)
    for length in (8, 9):  # the second length makes it a symbol
        worst(model, twin, batch(length))
    return model, twin


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_length_and_any_labels(pair: Any, data: st.DataObject) -> None:
    length = data.draw(st.integers(3, 24))
    inputs = batch(length)
    shown = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length))).view(2, length)
    shown[0, 1] = True  # a mean over nothing is NaN here and there
    inputs["labels"] = inputs["input_ids"].masked_fill(~shown, -100)
    assert worst(*pair, inputs) < 5e-6
