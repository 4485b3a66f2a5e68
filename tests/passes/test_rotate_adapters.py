"""rotate under low-rank adapters: the base folds, what is trained is rotated at run time, and gradients reach it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import fuseline
from fuseline.compiler import ops
from fuseline.compiler.precision import error
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape

IDS = torch.arange(10).reshape(2, 5) % VOCABULARY
EXACT = 1e-12


class Adapted(nn.Module):
    """A frozen linear and a trained product of two thin ones beside it, as in LoRA (Hu et al., 2021)."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float = 0.0):
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, rank, bias=False).double()
        self.b = nn.Linear(rank, base.out_features, bias=False).double()
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(self.dropout(x))) * 0.5


def adapted(shape: Shape, *, rank: int = 2, everywhere: bool = False, dropout: float = 0.0) -> nn.Module:
    """A decoder, frozen, with adapters on its queries and values, or on every linear of its blocks."""
    model = Decoder(shape).requires_grad_(False)
    for attention in model.attentions:
        for i in (0, 1, 2) if everywhere else (0, 2):
            attention.qkv[i] = Adapted(attention.qkv[i], rank, dropout)
        if everywhere:
            attention.out = Adapted(attention.out, rank, dropout)
    if everywhere:
        for mlp in model.mlps:
            mlp.up, mlp.gate, mlp.down = (Adapted(linear, rank, dropout) for linear in (mlp.up, mlp.gate, mlp.down))
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(IDS)
    nn.functional.cross_entropy(logits.flatten(0, 1), IDS.flatten().roll(1)).backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def optimized(model: nn.Module, options: str) -> tuple[nn.Module, Any]:
    """A copy, optimized and called once with gradients, and what was compiled for it."""
    torch.compiler.reset()
    mine = fuseline.optimize(copy.deepcopy(model), f"raise,rotate{{{options}}}", verify="full")
    mine(IDS)
    (compiled,) = fuseline.reports(mine)
    assert compiled.program.training
    return mine, compiled


def refusal(model: nn.Module) -> str:
    """Why r1 is refused."""
    _, compiled = optimized(model, "r1,allow_empty")
    (reason,) = set(compiled.report["rotate"].refused.values())
    return reason


@pytest.mark.one_in(6)
@pytest.mark.parametrize("options", ["r1", "r1,r4,kind=random-hadamard", "r1,r2,r3,r4,kind=orthogonal"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_gradients_are_those_of_the_model_as_it_is(options: str, everywhere: bool) -> None:
    model = adapted(Shape(width=16, inner=32, head=8, groups=2, bias=True, scale=0.5), everywhere=everywhere)
    mine, compiled = optimized(model, options)
    report = compiled.report["rotate"]
    assert not [r for r in report.refused.values() if r.startswith(("R1", "R2"))]
    expected, found = gradients(model), gradients(mine)
    assert expected.keys() == found.keys() and len(expected) > 8
    assert max(error(found[name], expected[name]) for name in expected) < EXACT


@pytest.mark.slow
def test_only_thin_weights_are_rotated_at_run_time() -> None:
    mine, compiled = optimized(adapted(Shape(width=16, inner=32, head=8)), "r1")
    turned = [n for n in compiled.program.graph.nodes if n.target is ops.hadamard.overload]
    assert {tuple(n.meta["val"].shape) for n in turned} == {(2, 16)} and len(turned) == 4, "no activation is"
    assert all(p.grad is None for p in mine.parameters() if not p.requires_grad)


@pytest.mark.slow
def test_wide_trained_weights_refuse() -> None:
    model = adapted(Shape(width=16, inner=32, head=8, layers=4), rank=8)
    assert "operations would be left at run time" in refusal(model)


@pytest.mark.slow
def test_dropout_before_an_adapter_refuses() -> None:
    """It drops channels of the basis that the adapter was written in."""
    model = adapted(Shape(width=16, inner=32, head=8, layers=4), dropout=0.5).train()
    assert "operations would be left at run time" in refusal(model)


@pytest.mark.slow
def test_trained_scales_of_norms_stay_and_get_their_gradients() -> None:
    model = adapted(Shape(width=16, inner=32, head=8, layers=4))
    for norms in model.norms:
        norms[0].weight.requires_grad_(True)
    assert "operations would be left at run time" in refusal(model)
    mine, _ = optimized(model, "r1,r2,r4")
    expected, found = gradients(model), gradients(mine)
    assert max(error(found[name], expected[name]) for name in expected) < EXACT


def test_a_step_of_training_is_seen_by_the_next_call() -> None:
    model = adapted(Shape(width=16, inner=32, head=8, layers=1))
    mine, _ = optimized(model, "r1,r4")
    for one in (model, mine):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            gradients(one)
            optimizer.step()
    with torch.no_grad():
        assert error(mine(IDS), model(IDS)) < 1e-9
    assert len(fuseline.reports(mine)) == 2, "one graph with gradients, one without"


def test_trained_shifts_of_layer_norms_and_biases_behind_them_get_their_gradients() -> None:
    """A shift folds into the biases of what reads the norm, if neither is trained."""
    for trained in ("norms.0.0.bias", "attentions.0.qkv.0.bias"):
        model = Decoder(Shape(width=16, inner=32, head=8, layers=1, norm="layer", bias=True)).requires_grad_(False)
        model.get_parameter(trained).requires_grad_(True)
        mine, compiled = optimized(model, "r1,r2,r4")
        assert not compiled.report["rotate"].refused
        expected, found = gradients(model), gradients(mine)
        assert expected.keys() == found.keys() == {"logits", trained}
        assert max(error(found[name], expected[name]) for name in expected) < EXACT
