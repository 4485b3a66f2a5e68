"""A proof of each rewrite of rotate, which no wrong rewrite gets: folds are broken on purpose, and it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import fuseline
import tests.strategies  # noqa: F401  the profile of the project's fuzz tests
from fuseline.compiler import ops
from fuseline.compiler.errors import VerificationError
from fuseline.compiler.expressions import Blocks, Cast, Expression, Orthogonal, Scale, Transpose
from fuseline.compiler.observe import Proof
from fuseline.passes.rotation import carriers
from fuseline.passes.rotation.products import Fold, Product
from fuseline.passes.rotation.rotations import Rotation
from tests.passes.rotated_models import VOCABULARY, Decoder, Shape, shapes
from tests.passes.test_rotate import kinds, program, subsets

ALL = "r1,r2,r3,r4"


def proof_of(model: torch.nn.Module, options: str = ALL) -> Proof:
    _, proof = fuseline.prove(program(model), f"raise{{allow_empty}},rotate{{{options},allow_empty}}")
    return proof


def failing(proof: Proof) -> dict[str, str]:
    """What is not proved: rewrite → status."""
    return {s.rule: s.status for s in proof.statements if not s.is_proved}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("kind", "norm"), [("hadamard", "layer"), ("random-hadamard", "unit"), ("orthogonal", "rms")])
def test_every_rewrite_is_proved(kind: str, norm: str) -> None:
    proof = proof_of(Decoder(Shape(norm=norm, bias=True, groups=2, fused=True, mlp="fused")), f"{ALL},kind={kind}")
    assert proof.is_complete and not failing(proof) and proof.count > 40
    assert {"R1", "R2", "R3", "R4"} <= {s.rule.split()[0] for s in proof.statements}
    assert max(s.error for s in proof.statements) < 1e-14
    assert "R·Rᵀ = 1" in proof.axioms and "rms(x·R) = rms(x)·R" in proof.axioms
    proof.check()


def test_layers_that_claim_the_same_are_judged_once() -> None:
    one, two = (proof_of(Decoder(Shape(layers=n))) for n in (1, 2))
    assert len(one.statements) == len(two.statements) and (one.count, two.count) == (26, 26 + 22)
    texts = {s.rule: s.text for s in two.statements}
    assert texts["R4 online"] == "x1·W1ᵀ·H12 = x1·H20·H20·W1ᵀ·H12"
    assert texts["R2 into rows"] == "x1·H12·diag(w1)·W1ᵀ = x1·H12·diag(w1)·W1ᵀ·H6·H6"
    assert set(two.rotations) == {"H6", "H12", "H20"} and max(two.rotations.values()) < 1e-15
    assert two.unread["raise"] > 0
    again = json.loads(json.dumps(two.to_json()))
    assert again["proved"] == again["count"] == two.count and again["complete"]


def wrong_side(self: Rotation, x: Expression, dim: int, size: int, device: str) -> Expression:
    return Blocks(x, Transpose(Orthogonal(self.block, self.seed, device), 0, 1), dim)


def late_scale(self: Rotation, weight: Expression, value: Any, dim: int, scale: Expression | None = None) -> Expression:
    dim %= value.dim()
    turned = self._times(Cast(weight, torch.float64), dim, value.shape[dim], str(value.device))
    return Cast(turned if scale is None else Scale(turned, scale, dim), value.dtype)


def no_bias(self: Product, new: Any, fold: Fold) -> Any:
    return self.rebuilt(new, self.x, fold(self.expression, self.weight.meta["val"], self.outputs))


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("owner", "name", "broken", "options", "rules"),
    [
        (Rotation, "_times", wrong_side, "r1,kind=orthogonal", {"R1 into rows", "R1 into columns"}),
        (Rotation, "_times", wrong_side, "r2,kind=orthogonal", {"R2 into rows", "R2 into columns"}),
        (Rotation, "_times", wrong_side, "r4,kind=orthogonal", {"R4 online"}),
        (Rotation, "fold", late_scale, "r1", {"R1 into columns"}),
        (Product, "with_rows", no_bias, "r1", {"R1 into rows"}),
        (Product, "with_rows", no_bias, "r2", {"R2 into rows"}),
    ],
)
def test_a_wrong_fold_is_not_proved(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, broken: Callable, options: str, rules: set[str]
) -> None:
    monkeypatch.setattr(owner, name, broken)
    proof = proof_of(Decoder(Shape(bias=True)), options)
    wrong = [s for s in proof.statements if not s.is_proved]
    assert {s.rule for s in wrong} == rules
    for s in wrong:
        assert s.status == "not proved" and s.left, "by algebra"
        assert s.error is not None and s.error > 1e-2, "and by numbers"
    with pytest.raises(VerificationError, match="are not proved") as raised:
        proof.check()
    assert any(s.text in line for s in wrong for line in raised.value.details)


def test_keys_alone_may_not_be_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def second(self: Rotation, new: Any, x: Any, inverse: bool = False) -> Any:
        seen.append(1)
        return x if len(seen) % 2 else new(ops.hadamard, new(torch.ops.aten.mul.Tensor, x, 1.0), None, 4, False)

    monkeypatch.setattr(Rotation, "online", second)
    (statement,) = proof_of(Decoder(Shape(head=4)), "r3").statements
    assert statement.status == "not proved" and statement.error is not None and statement.error > 1e-2
    assert statement.text.endswith("(x1·H4·x2ᵀ, x3)") and "H4" in (statement.left or "")


def test_a_proof_asks_nothing_of_the_carriers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that carries no basis, declared to carry one: the rewrite happens, and the proof names the op."""

    class Squashed(Decoder):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(torch.tanh(self.embed(ids))))

    monkeypatch.setitem(carriers._HANDLERS, "tanh", carriers._first)
    proof = proof_of(Squashed(Shape()), "r1")
    assert failing(proof) == {"R1 commutes": "not translated: op aten.tanh.default"}
    (statement,) = [s for s in proof.statements if not s.is_proved]
    assert statement.error is not None and statement.error > 1e-2


def test_a_mean_that_is_not_taken_away_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from fuseline.passes.rotation import centring

    monkeypatch.setattr(centring, "_centred", lambda x, value, dim: Cast(x, value.dtype))
    proof = proof_of(Decoder(Shape(norm="layer", layers=1)), "r1")
    assert failing(proof)["layer norm of a centred stream"] == "not proved"


def test_what_no_pass_states_is_an_error() -> None:
    with pytest.raises(fuseline.UserError, match="says what its rewrites claim") as raised:
        fuseline.prove(program(Decoder(Shape())), "raise")
    assert "rotate{r1,r2,r4}" in str(raised.value)


def test_a_random_op_is_never_taken_for_a_function() -> None:
    """Values are dropped at random in front of R: the same op twice gives two results."""

    class Dropped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = torch.nn.Embedding(VOCABULARY, 8), torch.nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            x = self.out(x) + torch.nn.functional.dropout(x, 0.5, training=True)
            return self.out(torch.nn.functional.rms_norm(x, (8,), None, 1e-5))

    assert failing(proof_of(Dropped().double(), "r1")) == {"R1 enters": "not translated: op dropout"}


@settings(max_examples=5)
@given(shapes, subsets, kinds)
def test_random_transformers_are_proved(shape: Shape, rotations: list[str], kind: str) -> None:
    assert not failing(proof_of(Decoder(shape), f"{','.join(rotations)},kind={kind}"))


@pytest.mark.slow
def test_smollm2_is_proved() -> None:
    from fuseline.cli.graphs import load_program

    _, proof = fuseline.prove(load_program("demo:smollm2"), f"raise,rotate{{{ALL}}}")
    proof.check()
    assert proof.count == 601 and len(proof.statements) < 20
