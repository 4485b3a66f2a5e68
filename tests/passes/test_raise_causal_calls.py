"""Attention that must stay PyTorch's call (it drops weights, or runs under autocast) loses a mask that was proved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fuseline.compiler.observe.numerics import error
from fuseline.compiler.pipeline import Pipeline
from fuseline.compiler.program import Program
from tests.passes.raise_helpers import rand, run, traced

WINDOW = 3


def mask(kind: str, queries: int, keys: int, pad: torch.Tensor) -> torch.Tensor:
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    found = (j <= i + (keys - queries if kind == "offset" else 0))[None, None]
    if kind == "sliding":
        found = found & (j > i - WINDOW)
    if kind == "padded":
        found = found & pad[:, None, None, :]
    if kind == "full":
        found = (j >= 0)[None, None, None].expand(1, 1, queries, keys)
    return torch.where(found, 0.0, float("-inf")).double() if kind == "additive" else found


def attended(kind: str, keys: int = 6, p: float = 0.25, **how: Any) -> tuple[Program, Program, Any]:
    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask(kind, 6, keys, pad), dropout_p=p, **how)

    inputs = (rand(2, 4, 6, 8), rand(2, 4, keys, 8), rand(2, 4, keys, 8), torch.rand(2, keys) > 0.2)
    program = traced(function, *inputs)
    after, report = Pipeline("raise{allow_empty}").run(program, verification="full")
    return program, after, report["raise"]


def call(program: Program) -> torch.fx.Node:
    (found,) = (
        n for n in program.graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default
    )  # fmt: skip
    return found


@pytest.mark.parametrize("kind", ["causal", "additive"])
def test_a_causal_mask_becomes_a_word(kind: str) -> None:
    program, after, report = attended(kind, scale=0.3)
    assert report.rules == {"CausalCall": 1} and not report.refused
    node = call(after)
    assert node.args[3:] == (None, 0.25, True) and node.kwargs == {"scale": 0.3, "enable_gqa": False}
    assert not [n for n in after.graph.nodes if getattr(n.target, "_opname", "") == "arange"]
    assert error(run(after), run(program)) < 1e-12  # the same weights are dropped


def test_a_mask_that_shows_everything_goes() -> None:
    program, after, report = attended("full")
    assert report.rules == {"CausalCall": 1} and call(after).args[3:] == (None, 0.25, False)
    assert error(run(after), run(program)) < 1e-12


REASONS = {
    "padded": "PyTorch's call has no word for this mask but the mask itself",
    "sliding": "PyTorch's call has no word for this mask but the mask itself",
    "offset": "PyTorch's call has no word for this mask but the mask itself",
}


@pytest.mark.parametrize("kind", REASONS)
def test_other_masks_stay(kind: str) -> None:
    program, after, report = attended(kind, keys=9 if kind == "offset" else 6)
    assert not report.rules and any(REASONS[kind] in reason for reason in report.refused.values())
    assert call(after).args[3] is not None
    # The refusal is right: is_causal is another mask.
    q, k, v, pad = program.examples
    written = F.scaled_dot_product_attention(q, k, v, mask(kind, 6, k.shape[2], pad))
    assert error(F.scaled_dot_product_attention(q, k, v, is_causal=True), written) > 1e-2
