"""Mixtures of transformers: one op a layer, whatever runs their experts, forward, backward and in generate()."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fuseline
from fuseline.compiler import ops
from fuseline.compiler.observe.numerics import error
from fuseline.models.experts import NAME, register, use
from tests.helpers.mixtures import FAMILIES, build, tokens


def layers(program) -> int:
    return sum(node.target is ops.moe.overload for node in program.graph.nodes)


@torch.no_grad()
@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_over_experts_is_captured_whole(family: str) -> None:
    model = build(family, "eager")
    program = fuseline.capture(model, (tokens(),))
    assert layers(program) == 1  # even before any pass
    assert model.config._experts_implementation == "eager"  # as it was
    assert error(program.run(program.examples)[0], model(tokens()).logits) < 1e-12


def step(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.one_in(14)
@pytest.mark.parametrize("implementation", ["eager", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step(family: str, implementation: str | None) -> None:
    """Under transformers' default and its loop, each as one graph. Norms and the loss are float32 in transformers."""
    expected = step(build(family, "eager").train())
    torch.compiler.reset()
    model = build(family, implementation).train()
    fuseline.optimize(model, "raise", fullgraph=True)
    found = step(model)
    (one,) = fuseline.reports(model)
    assert layers(one.program) == 1 and one.captured.training
    assert found.keys() == expected.keys()
    assert max(error(found[name], expected[name]) for name in expected) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_alone_has_the_gradients_of_the_loop(family: str) -> None:
    """No norm and no loss in between: float64 throughout."""
    loop, ours = ((layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe).experts for layer in (
        build(family, "eager").model.layers[0], build(family).model.layers[0]
    ))  # fmt: skip
    register()
    use(ours)
    ours.config._experts_implementation = NAME
    x = torch.randn(9, 32, dtype=torch.float64)
    ids = torch.stack([torch.randperm(loop.num_experts)[:2] for _ in range(9)])
    weights = torch.rand(9, 2, dtype=torch.float64)
    results = []
    for module in (loop, ours):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = module(leaves[0], ids, leaves[1])
        results.append([out, *torch.autograd.grad(out.square().sum(), [*leaves, *module.parameters()])])
    assert max(error(a, b) for a, b in zip(*results, strict=True)) < 1e-12


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", None])
def test_generate_has_no_graph_break(implementation: str | None) -> None:
    torch.compiler.reset()
    model = build("Mixtral", implementation, torch.float32)
    model.config.use_cache = True
    expected = model.generate(tokens(2, 5), max_new_tokens=5, do_sample=False)
    fuseline.optimize(model, "raise")
    assert torch.equal(model.generate(tokens(2, 5), max_new_tokens=5, do_sample=False), expected)
    assert not fuseline.breaks(model)
    assert [layers(one.program) for one in fuseline.reports(model)] == [1] * len(fuseline.reports(model))


def test_a_unit_that_is_not_known_runs_as_batched_products() -> None:
    model = build("Mixtral", "eager")
    experts = model.model.layers[0].mlp.experts
    kind = type(experts)
    before = kind._apply_gate
    kind._apply_gate = lambda self, both: torch.tanh(both[..., : both.shape[-1] // 2])
    try:
        with torch.no_grad():
            program = fuseline.capture(model, (tokens(),))
    finally:
        kind._apply_gate = before
    assert layers(program) == 0
    assert any(getattr(node.target, "_opname", "") == "bmm" for node in program.graph.nodes)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("options", ["", "{method=reap}", "{method=milo,weights=int3:g8,rank=2,rounds=2}"])
def test_a_merged_model_is_saved_and_loaded(family: str, options: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    model = build(family, "eager", torch.bfloat16)
    data = [tokens(seed=s) for s in range(2)]
    fuseline.optimize(model, f"raise,merge-experts{options}", calibration=data, keep_originals=False)
    expected = model(tokens()).logits
    fuseline.save(model, tmp_path / "out")
    loaded = fuseline.load(tmp_path / "out")
    assert torch.equal(loaded(tokens()).logits, expected) and not fuseline.breaks(loaded)


@torch.no_grad()
@pytest.mark.one_in(2)
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_a_rotation_folds_into_experts(family: str) -> None:
    """R1 goes into the columns of one stack and the rows of the other, biases too, and leaves nothing at run time."""
    model = build(family)
    program = fuseline.capture(model, (tokens(),))
    rotated, report = fuseline.Pipeline("raise,rotate{r1}").run(program, verification="full")
    rules = report["rotate"].rules
    assert (rules["R1 into rows"], rules["R1 into columns"]) == (3, 6)
    assert "R1 enters" not in rules and not any(n.target is ops.hadamard.overload for n in rotated.graph.nodes)
    assert error(rotated.run(rotated.examples)[0], program.run(program.examples)[0]) < 1e-6
