"""Proofs of rotate's rewrites where products are written otherwise, weights are rotated at run time or by a plan."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

import fuseline
from fuseline.compiler.errors import VerificationError
from fuseline.compiler.observe import Proof, Prove
from fuseline.compiler.plan import Plan
from fuseline.passes.rotation import turn
from fuseline.passes.rotation.rotations import Rotation
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape
from tests.passes.test_rotate import IDS, program
from tests.passes.test_rotate_adapters import adapted
from tests.passes.test_rotation_proof import failing, proof_of

LEARNED = "raise,rotate{r1,r2,r4,kind=learned,steps=2},quantize{weights=int4:sym}"


class Columns(nn.Module):
    """A square matrix for each token, times its channels as a column."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.matrices = nn.Embedding(VOCABULARY, 8), nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.rms_norm(self.embed(ids.flatten()), (8,), None, 1e-5)
        return torch.bmm(self.matrices[ids.flatten() % 3], x[..., None]).squeeze(-1)


def test_columns_are_rows_of_the_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = proof_of(Columns().double(), "r1")
    assert not failing(proof) and {"columns as rows", "R1 into columns"} <= {s.rule for s in proof.statements}

    def untransposed(rewriter: Any, node: Any, x: Any, stack: Any) -> None:
        aten = torch.ops.aten
        build = lambda new: new(aten.squeeze.dim, new(aten.bmm.default, new(aten.unsqueeze.default, x, 1), stack), 1)
        rewriter.rewrite(node, [node], build, "columns as rows")

    monkeypatch.setattr(import_module("fuseline.passes.rotation.prepare"), "_as_rows", untransposed)
    (wrong,) = [s for s in proof_of(Columns().double(), "r1").statements if not s.is_proved]
    assert (wrong.rule, wrong.status) == ("columns as rows", "not proved") and (wrong.error or 0) > 1e-2


@pytest.mark.one_in(2)
@pytest.mark.parametrize("head", [4, 6])
def test_heads_of_a_joint_product(monkeypatch: pytest.MonkeyPatch, head: int) -> None:
    model = Decoder(Shape(fused=True, by_head=True, groups=2, heads=4, head=head, bias=True, layers=1))
    proof = proof_of(model, "r2")
    rows = next(s for s in proof.statements if s.rule == "R2 into rows")
    assert not failing(proof) and "view(x) = Σ headᵢ(x·Pᵢ), Pᵢ the channels of head i" in rows.axioms

    monkeypatch.setattr(turn, "_spans", lambda node, block: [(0, block)])  # queries
    wrong = next(s for s in proof_of(model, "r2").statements if s.rule == "R2 into rows")
    assert wrong.status == "not proved" and wrong.left and (wrong.error or 0) > 1e-2


class Forms(nn.Module):
    """Parts, scales and casts as PyTorch code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.joint = nn.Embedding(VOCABULARY, 8), nn.Parameter(torch.randn(16, 8))
        self.scale, self.out = nn.Parameter(torch.rand(8)), nn.Linear(4, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        keys, values = self.joint.split([8, 8])
        h = nn.functional.rms_norm(x, (8,), 1.0 + self.scale, 1e-5)
        q, v = (nn.functional.linear(h, w).unflatten(-1, (2, 4)).transpose(1, 2) for w in (keys, values))
        first, second = v.repeat(1, 2, 1, 1).unbind(1)[:2]
        v = torch.stack([second, first, second[:, torch.tensor([0])].expand(first.shape)], 1).type_as(q)
        q = torch.cat([q, q[:, :1]], 1)
        y = torch.softmax(q @ q.transpose(-1, -2), -1) @ v
        return self.out((y + y.new_zeros(y.shape))[:, 0] + y.split([1, 2], 1)[1].sum(1))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_parts_are_written_as_code_has_them(kind: str) -> None:
    proof = proof_of(Forms().double(), f"r1,r2,kind={kind}")
    assert not failing(proof)
    expected = {"derived weight", "type as cast", "new as fresh", "R2 into rows", "R2 commutes", "R2 into columns"}
    assert expected <= {s.rule for s in proof.statements}


def trained(model: nn.Module, options: str) -> Proof:
    """The proof of what is compiled for a call with gradients."""
    torch.compiler.reset()
    observer = Prove()
    mine = fuseline.optimize(model, f"raise,rotate{{{options}}}", observers=[observer])
    mine(IDS)
    assert fuseline.reports(mine)[0].program.training
    return observer.proof


@pytest.mark.one_in(2)
@pytest.mark.parametrize("options", ["r1,r2,r3,r4,kind=orthogonal", "r1,r4,block=4"])
def test_adapters_are_rotated_at_run_time(options: str) -> None:
    shape = Shape(width=16, inner=32, head=8, groups=2, bias=True, scale=0.5, layers=1)
    proof = trained(adapted(shape, everywhere=True), options)
    assert not failing(proof) and proof.count > 25
    proof.check()


def test_a_scale_behind_the_rotation_of_an_adapter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(self: Rotation, new: Any, weight: Any, dim: int, scale: Any = None) -> Any:
        turned = right(self, new, weight, dim)
        return turned if scale is None else new(torch.ops.aten.mul.Tensor, turned, new.weight(scale))

    right = Rotation.fold_at_run_time
    monkeypatch.setattr(Rotation, "fold_at_run_time", late)
    assert failing(trained(adapted(Shape(width=16, inner=32, head=8, layers=1)), "r1")) == {
        "R1 into columns": "not proved"
    }


@pytest.fixture(scope="module")
def learned() -> tuple[nn.Module, Plan]:
    model = Decoder(Shape(width=16, head=8, inner=32, layers=1, bias=True)).float()
    return model, fuseline.analyze(model, LEARNED, [(IDS,)] * 2)


def test_a_plans_rotations_are_proved(learned: tuple[nn.Module, Plan]) -> None:
    model, plan = learned
    _, proof = fuseline.prove(program(model), LEARNED, plan)
    assert not failing(proof) and proof.count > 20
    assert sum(name.startswith("Q") and "/" in name for name in proof.rotations) == 2
    proof.check()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("label", ["R1", "R2"])
def test_a_plan_that_is_not_orthogonal_is_not_proved(learned: tuple[nn.Module, Plan], label: str) -> None:
    model, plan = learned
    tensors = next(p["rotate"].tensors for p in plan.sites.values() if label in p["rotate"].tensors)
    kept = tensors[label]
    try:
        tensors[label] = kept + 1e-9 * torch.ones_like(kept)
        _, proof = fuseline.prove(program(model), LEARNED, plan)
    finally:
        tensors[label] = kept
    wrong = failing(proof)
    assert {rule.split()[0] for rule in wrong} == {label} and set(wrong.values()) == {"not proved"}
    with pytest.raises(VerificationError, match="are not proved") as raised:
        proof.check()
    assert any("is not orthogonal: max|R·Rᵀ − 1| = " in line for line in raised.value.details)
