"""Outliers are planted exactly and are outliers; what the benchmark says of them is its definition."""

from __future__ import annotations

import copy
import math
from typing import Any

import outliers
import pytest
import torch
from planting import KINDS, Spread, plant, reflect

pytest.importorskip("transformers")
SMALL = ["--device", "cpu", "--model", "demo:tiny-llama", "--windows", "1", "--length", "48", "--channels", "2"]
IDS = torch.arange(24).unsqueeze(0) * 7 % 512


@pytest.fixture(scope="module")
def model() -> Any:
    from fuseline.models.spec import load

    return load("demo:tiny-llama").model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def tails(model: Any, kind: str) -> dict[str, float]:
    with Spread(model) as spread:
        logits(model)
    return spread.summary()[kind]


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_a_planted_pair_changes_no_bit_and_makes_outliers(model: Any, kind: str) -> None:
    planted = copy.deepcopy(model)
    plant(planted, [(kind, 64.0)], channels=2)
    assert torch.equal(logits(planted), logits(model))
    assert any(not torch.equal(a, b) for a, b in zip(planted.parameters(), model.parameters()))
    before, after = tails(model, kind), tails(planted, kind)
    assert after["peak"] > 1.3 * before["peak"] and after["kurtosis"] > 3 * before["kurtosis"]


def test_half_a_pair_is_no_planting(model: Any) -> None:
    """The test above would see it: one row alone, or the columns of one query head of a group alone."""
    planted = copy.deepcopy(model)
    plant(planted, [("values", 64.0)], channels=1)
    for layer, original in zip(planted.model.layers, model.model.layers):
        layer.self_attn.o_proj.weight.data[:, :32] = original.self_attn.o_proj.weight[:, :32]
    assert (logits(planted) - logits(model)).abs().max() > 1e-2


def test_a_reflected_stream_is_exact_and_has_an_outlier(model: Any) -> None:
    original = copy.deepcopy(model).double()
    for norm in (m for m in original.modules() if type(m).__name__.endswith("RMSNorm")):
        norm.weight.data.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
    folded, reflected = copy.deepcopy(original), copy.deepcopy(original)
    reflect(folded, None)
    reflect(reflected, original.model.embed_tokens.weight[7])
    assert outliers.difference(original, folded, IDS) < 1e-12
    assert outliers.difference(folded, reflected, IDS) < 1e-12
    stream = reflected.model.embed_tokens.weight[7]
    assert stream[0].abs() > 0.999 * stream.norm()


@pytest.mark.slow
def test_a_tied_head_gets_its_own_table(model: Any) -> None:
    tied = copy.deepcopy(model)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    reflected = copy.deepcopy(tied)
    reflect(reflected, torch.randn(128, generator=torch.Generator().manual_seed(0)))
    assert reflected.lm_head.weight is not reflected.model.embed_tokens.weight
    assert outliers.difference(tied, reflected, IDS) < 1e-6  # the tables are written back in float32


def test_unknown_kinds_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match="heads is none of inner, values, keys, norms"):
        plant(copy.deepcopy(model), [("heads", 2.0)], channels=1)


def test_what_is_recovered() -> None:
    found = outliers.recovered({"quantized": 3.0, "planted": 5.0, "planted_rotated": 3.1, "rotated": 2.9})
    assert found == pytest.approx({"cost": 2.0, "left": 0.1, "recovered": 0.95, "to_rotated": 0.9})
    assert math.isnan(
        outliers.recovered({"quantized": 3.0, "planted": 3.0, "planted_rotated": 3.1, "rotated": 3.0})["recovered"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["W4A4KV4", "W8A8 stream"])
def test_a_row_of_a_tiny_model(name: str) -> None:
    benchmark = outliers.Benchmark(outliers.parse(SMALL))
    row: dict[str, Any] = {}
    benchmark.fill(row, outliers.CASES[name])
    assert row["planted_original"] == pytest.approx(row["original"], rel=1e-6)
    assert row["quantized"] != row["planted"] and row["planted"] != row["planted_rotated"]
    assert row["recovered"] == 1 - (row["planted_rotated"] - row["quantized"]) / (row["planted"] - row["quantized"])


@pytest.mark.slow
def test_every_case_is_checked_in_float64() -> None:
    row: dict[str, Any] = {}
    outliers.Benchmark(outliers.parse(SMALL)).check(row)
    assert row["errors"].keys() == outliers.CASES.keys() and row["error"] < 1e-12
    assert row["tails"]["KV4 keys"]["keys"]["after"]["peak"] > 1.3 * row["tails"]["KV4 keys"]["keys"]["before"]["peak"]
