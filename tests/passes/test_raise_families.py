"""`raise` on the families that it must handle, through both fronts: counts from the configuration, masks, numerics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fuseline.compiler.capture import capture
from fuseline.compiler.observe import Numerics
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from fuseline.compiler.provenance import source_line
from tests.passes.families import FAMILIES, attentions, described, padding, through_dynamo, tokens

BOUND = 1e-5  # max|Δ| / max|reference| in float32


def exported(model: torch.nn.Module, dynamic: bool, padded: bool) -> Program:
    sequence = {1: torch.export.Dim.AUTO}
    inputs: dict[str, Any] = {"input_ids": tokens()}
    if padded:
        inputs["attention_mask"] = padding()
    return capture(model, (), inputs, dynamic=dict.fromkeys(inputs, sequence) if dynamic else None)


def without_cache(family: str, **changes: Any) -> torch.nn.Module:
    model = FAMILIES[family].build(**changes)
    model.config.use_cache = False
    return model


def lines_kept(program: Program) -> float:
    computed = [
        n for n in program.graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    return sum(source_line(n) is not None for n in computed) / len(computed)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_exported(family: str, dynamic: bool) -> None:
    """The dynamic program is padded too, so that its masks are joined with the caller's."""
    model = without_cache(family)
    program = exported(model, dynamic, padded=dynamic)
    raised, report = Pipeline("raise").run(program, [Numerics()], "full")
    expected, config = FAMILIES[family], model.config

    assert report["raise"].rules == expected.rules(config)
    assert not report["raise"].refused
    assert described(raised) == expected.kinds(config)
    for node in attentions(raised):
        assert node.args[6] == 0
        mask = node.args[3]
        assert (mask is not None) == dynamic
        if mask is not None:
            batch, heads, queries, keys = mask.meta["val"].shape
            assert (batch, heads, queries) == (2, 1, 1)
            assert keys == program.placeholders[0].meta["val"].shape[1]
    assert report["raise"].error < BOUND
    assert lines_kept(raised) >= 0.99

    flat = program.examples
    before, after = program.run(flat), raised.run(flat)
    assert max_error(after, before) < BOUND


def max_error(actual: Any, expected: Any) -> float:
    from fuseline.compiler.observe.numerics import error, floats

    return max(error(a, e) for a, e in zip(floats(actual), floats(expected), strict=True))


def test_a_dynamic_program_serves_other_lengths() -> None:
    model = without_cache("gemma2")
    raised, _ = Pipeline("raise").run(exported(model, dynamic=True, padded=True))
    module = raised.to_module()
    for length in (3, 5, 17):
        inputs = {"input_ids": tokens(2, length), "attention_mask": padding(length)}
        with torch.no_grad():
            assert max_error(module(**inputs).logits, model(**inputs).logits) < BOUND


@pytest.mark.one_in(8)
@pytest.mark.parametrize("family", FAMILIES)
def test_through_dynamo(family: str) -> None:
    model = without_cache(family)
    with torch.no_grad():
        graphs = through_dynamo(model, lambda m: m(tokens()))
    assert len(graphs) == 1
    (graph,) = graphs
    assert graph.report.rules == FAMILIES[family].rules(model.config)
    assert not graph.report.refused
    assert described(graph.after) == FAMILIES[family].kinds(model.config)
    assert graph.error < BOUND
    assert lines_kept(graph.after) >= 0.99


@pytest.mark.one_in(5)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2", "bert"])
def test_eager_attention(family: str) -> None:
    """Attention written out, with an additive mask that is proved all the same; unpadded, so that no row is empty."""
    model = without_cache(family, attention="eager")
    with torch.no_grad():
        (graph,) = through_dynamo(model, lambda m: m(tokens()))
    assert graph.report.rules == FAMILIES[family].rules(model.config)
    assert described(graph.after) == FAMILIES[family].kinds(model.config)
    assert all(n.args[3] is None for n in attentions(graph.after))
    cap = getattr(model.config, "attn_logit_softcapping", None) or 0.0
    assert [n.args[8] for n in attentions(graph.after)] == [cap] * model.config.num_hidden_layers
    assert graph.error < BOUND


def test_eager_attention_keeps_a_padded_mask() -> None:
    """A row that sees no key is spread over all keys by the lowest finite number, so this mask must stay."""
    model = without_cache("llama", attention="eager")
    with torch.no_grad():
        (graph,) = through_dynamo(model, lambda m: m(tokens(), attention_mask=padding()))
    nodes = attentions(graph.after)
    assert described(graph.after) == [("full", 0)] * len(nodes)
    assert {n.meta["custom"]["fuseline_mask"] for n in nodes} == {
        "padding may leave a row without a key, and the mask adds a finite number there"
    }
    assert graph.error < BOUND
    # Replacing it anyway by the causal kind and the padding would change the padded rows.
    first = nodes[0]
    q, k, v = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    visible = torch.ones(8, 8, dtype=torch.bool).tril() & padding().bool()[:, None, None, :]
    additive = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    written = torch.softmax(q @ k.transpose(-1, -2) * first.args[4] + additive, -1) @ v
    forced = torch.ops.fuseline.attention(q, k, v, padding().bool()[:, None, None, :], first.args[4], "causal")
    assert max_error(forced, written) > 1e-2


def generated(family: str, attention: str = "sdpa", **options: Any) -> list[Any]:
    model = FAMILIES[family].build(attention)
    with torch.no_grad():
        expected = model.generate(tokens(2, 6), max_new_tokens=5, do_sample=False, **options)
        results: list[torch.Tensor] = []
        graphs = through_dynamo(
            model, lambda m: results.append(m.generate(tokens(2, 6), max_new_tokens=5, do_sample=False, **options))
        )
    assert torch.equal(results[0], expected)
    for graph in graphs:
        assert graph.error < BOUND
        assert graph.report.rules == FAMILIES[family].rules(model.config)
    return graphs


@pytest.mark.slow
def test_generate_with_a_dynamic_cache() -> None:
    """Prefill is causal; one query at the end sees every key that the padding leaves, with K and V lengths apart."""
    prefill, decode, symbolic = generated("llama")
    assert described(prefill.after) == [("causal", 0)] * 2
    assert described(decode.after) == described(symbolic.after) == [("full", 0)] * 2
    for graph in (prefill, decode, symbolic):
        assert all(n.args[3].meta["val"].shape[1:3] == (1, 1) for n in attentions(graph.after))
    key, value = (n.meta["val"] for n in attentions(symbolic.after)[0].args[1:3])
    assert str(key.shape[2]) != str(value.shape[2])


@pytest.mark.slow
def test_generate_with_a_static_cache() -> None:
    """Repetition folds although the cache is written in place; the mask of the decode step comes ready made."""
    prefill, decode = generated("llama", cache_implementation="static")
    assert described(prefill.after) == [("causal", 0)] * 2
    assert prefill.before.mutated and decode.before.mutated
    for node in attentions(decode.after):
        assert node.args[5] == "full" and node.args[3].op == "placeholder"
        assert node.args[1].meta["val"].shape[1] == 2


@pytest.mark.slow
def test_generate_with_a_sliding_cache() -> None:
    graphs = generated("mistral")
    assert described(graphs[0].after) == [("sliding", 5)] * 2
    assert len(graphs) >= 2


def test_training_step() -> None:
    """Loss and gradients through the raised graph are those of the captured one."""
    model = FAMILIES["llama"].build().train()

    def step(m: torch.nn.Module) -> None:
        m(tokens(), labels=tokens(), use_cache=False).loss.backward()

    step(model)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    (graph,) = through_dynamo(model, step)
    assert graph.before.training
    assert graph.report.rules == FAMILIES["llama"].rules(model.config)
    assert graph.error < BOUND
    for name, parameter in model.named_parameters():
        assert max_error(parameter.grad, expected[name]) < BOUND, name
