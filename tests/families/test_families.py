"""The family table holds: a run gives what docs/families.json says, for some rows always, for all in the long run.

A difference is a change to look at: for the better, `python -m tests.families ROW` writes the row's record again.
"""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec

import pytest
import torch

import fuseline
from tests.families.measure import BOUND, PASSES, Outcome, compiled, divergence, judge, largest_error, measure
from tests.families.registry import ROWS, records
from tests.families.rows import Row, draw, tokens
from tests.helpers.models import error

#: Attention of several kinds, experts, no attention, a graph that breaks; the other cells of the table are slow.
QUICK = (
    ("Llama", "raise,fuse"), ("GPT-2", "int8"), ("OLMo 2", "int8"), ("Mixtral, grouped_mm", "raise,fuse"),
    ("GPT with graph breaks", "raise,fuse"), ("CNN", "int8"), ("nn.LSTM", "raise,fuse"),
)  # fmt: skip
CELLS = [
    pytest.param(row, column, marks=() if (row, column) in QUICK else pytest.mark.slow, id=f"{row}-{column}")
    for row in ROWS
    for column in PASSES
]


@pytest.mark.parametrize(("row", "column"), CELLS)
def test_a_row_is_what_its_record_says(row: str, column: str) -> None:
    recorded = records()["rows"][row]["passes"][column]
    outcome = measure(ROWS[row], column)
    assert (outcome.outcome, outcome.reason) == (recorded["outcome"], recorded.get("reason"))
    assert outcome.graphs == recorded.get("graphs", 0)
    if column != "raise,fuse":  # what `fuse` joins is its own tests' business
        assert outcome.rules == recorded.get("rules", {})
    assert outcome.refused == recorded.get("refused", {})
    if outcome.outcome == "lossy":
        # Another machine rounds elsewhere in float32, and one token whose experts change for it moves the whole figure.
        assert outcome.kl == pytest.approx(recorded["kl"], rel=3 if ROWS[row].smooth else 0.1)
    elif outcome.outcome != "fails":
        assert outcome.error is not None and outcome.error <= BOUND


def test_every_row_has_a_record_and_no_other_has() -> None:
    assert list(records()["rows"]) == list(ROWS)
    for name, record in records()["rows"].items():
        assert (record["kind"], record["traits"]) == (ROWS[name].kind, ROWS[name].traits)
        assert list(record["passes"]) == list(PASSES)


def test_the_table_is_as_broad_as_it_should_be() -> None:
    rows = records()["rows"]
    equal = {
        name
        for name, record in rows.items()
        if all(record["passes"][c]["outcome"] in ("exact", "refused") for c in ("raise", "raise,fuse"))
    }
    kinds = Counter(rows[name]["kind"] for name in equal)
    assert len(rows) >= 45 and len(equal) >= 40
    assert kinds["decoder"] >= 25 and kinds["mixture of experts"] >= 6
    for name in set(rows) - equal:  # what breaks says why
        assert all(o["reason"] for o in rows[name]["passes"].values() if o["outcome"] == "fails")


def test_int8_is_within_two_percent_of_torchaos() -> None:
    """As recorded, with the measurement's own uncertainty: a ratio is at most 1.02, or not told apart from it."""
    rows = records()["rows"]
    lossy = [name for name, record in rows.items() if record["passes"]["int8"]["outcome"] == "lossy"]
    assert len(lossy) >= 40
    for name in lossy:
        peer = rows[name]["torchao"]
        assert peer["ratio"] - 2 * peer["deviation"] <= 1.02, (name, peer)
    ratios = torch.tensor([rows[name]["torchao"]["ratio"] for name in lossy], dtype=torch.float64)
    assert ratios.log().mean().exp() <= 1.02


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.parametrize("row", ["Llama", "GPT-2", "Mixtral, grouped_mm", "CNN"])
def test_torchaos_divergence_is_what_the_record_says(row: str) -> None:
    from tests.families.peer import compare

    recorded, now = records()["rows"][row]["torchao"], compare(ROWS[row])
    assert now.torchao == pytest.approx(recorded["torchao"], rel=0.05)
    assert now.ratio == pytest.approx(recorded["ratio"], abs=4 * (recorded["deviation"] + now.deviation))


def text(length: int, padded: int) -> dict[str, torch.Tensor]:
    """Three rows, the first padded on the left."""
    ids = tokens(3, length, seed=length)
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if row.kind in ("decoder", "mixture of experts")])
def test_padding_and_other_lengths(row: str) -> None:
    """One compiled model over calls that differ in length and padding; what padded positions hold is nobody's."""
    torch.compiler.reset()
    model = ROWS[row].model()
    calls = [text(length, padded) for length, padded in ((12, 0), (9, 3), (15, 0), (14, 4))]
    expected = [model(**call, use_cache=False).logits.clone() for call in calls]
    fuseline.optimize(model)
    for call, wanted in zip(calls, expected, strict=True):
        seen = call["attention_mask"].bool()
        assert error(model(**call, use_cache=False).logits[seen], wanted[seen]) <= BOUND
    # A scan over the sequence is unrolled, by Dynamo: a capture for each of the four lengths.
    assert len(fuseline.reports(model)) <= (4 if row == "Mamba" else 3)


def mlp() -> Row:
    return ROWS["MLP"]


def test_a_wrong_result_is_a_failure() -> None:
    model, expected, actual = compiled(mlp(), "raise,fuse")
    assert judge(mlp(), "raise,fuse", model, expected, actual).outcome == "exact"
    wrong = judge(mlp(), "raise,fuse", model, expected, actual + 1e-3 * expected.abs().max())
    assert wrong.outcome == "fails" and wrong.reason == "the outputs differ from eager by 1.0e-03"
    assert judge(mlp(), "raise,fuse", model, expected, actual[:1]).outcome == "fails"
    assert judge(mlp(), "raise,fuse", model, expected, torch.full_like(actual, torch.nan)).outcome == "fails"


def test_a_model_of_which_nothing_is_compiled_is_a_failure() -> None:
    outcome = measure(ROWS["nn.LSTM"], "raise")
    assert outcome.outcome == "fails" and "nothing was compiled: " in str(outcome.reason)


def test_an_exception_is_a_failure_with_its_message() -> None:
    def build() -> torch.nn.Module:
        raise RuntimeError("no such layer\nsecond line")

    row = Row("broken", "plain PyTorch", "", build, lambda batch, seed: {})
    assert measure(row, "raise") == Outcome("fails", "RuntimeError: no such layer second line")


def test_divergence_and_error() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64)
    assert divergence(logits, logits) == 0 and divergence(logits, logits + 3) == pytest.approx(0, abs=1e-12)
    p, q = torch.softmax(2 * logits / logits.std(), -1), torch.softmax(2 * logits.flip(0) / logits.std(), -1)
    assert divergence(logits, logits.flip(0)) == pytest.approx((p * (p / q).log()).sum(-1).mean().item())
    assert largest_error({"a": torch.ones(2)}, {"a": torch.ones(2)}) == 0
    assert largest_error({"a": torch.ones(2)}, {"a": torch.ones(3)}) == float("inf")


def test_weights_spread_the_logits_and_follow_the_seed() -> None:
    row = ROWS["Llama"]
    first, second, other = row.model(0), row.model(0), row.model(1)
    with torch.no_grad():
        logits = [row.logits(m(**row.inputs(2, 1))) for m in (first, second, other)]
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    assert 0.7 < logits[0].std() < 3
    draw(second, 1)
    assert all(torch.equal(a, b) for a, b in zip(second.parameters(), other.parameters(), strict=True))
