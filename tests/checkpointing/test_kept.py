"""What a plan says is kept is what the split keeps, to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fuseline.passes.checkpointing as checkpointing
from fuseline.models.shapes import Decoder, Shape
from tests.helpers.joint import kept, split_under_inductor


@pytest.mark.parametrize(
    "policy",
    [
        "long-context",
        "budget,memory=0.65",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("none", "full", "min-cut", "budget,memory=0.8")),
    ],
)
def test_the_split_keeps_what_the_plan_says(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 under Inductor, whose decompositions have the backward widen again what the forward widened."""
    torch.manual_seed(0)
    model = Decoder(Shape(hidden=64, inner=256, layers=4, heads=4, kv_heads=2, vocabulary=128), loss=False)
    said: list[float] = []
    tag = checkpointing.Checkpoint._tag

    def tagged(self: Any, problem: Any, choice: Any, rewriter: Any) -> None:
        said.append(self._predicted(problem, choice)["kept"])
        tag(self, problem, choice, rewriter)

    monkeypatch.setattr(checkpointing.Checkpoint, "_tag", tagged)
    pipeline = f"checkpoint{{policy={policy},device=h200}}"
    _, backward = split_under_inductor(model.to(torch.bfloat16), torch.randint(0, 128, (1, 512)), pipeline, monkeypatch)
    values = [n.meta["val"] for n in kept(backward) if "rng_state" not in n.name]  # of attention that runs again
    storages = {v.untyped_storage()._cdata: v.untyped_storage().nbytes() for v in values}
    assert [sum(storages.values())] == said
