"""docs/rotations.json holds: what `rotate` folds, leaves at run time and refuses in each family, how exact it is."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from tests.families.registry import ROWS
from tests.families.rotations import BOUNDS, FIRST, ORDER, measured, records
from tests.passes.test_rotate_refusals import REASONS

#: RMSNorms in front of the blocks, the result of none added to the stream.
PRE_NORM = [
    "SmolLM2-135M", "Llama", "Mistral", "Ministral", "Gemma", "Qwen 2", "Qwen 3", "SmolLM 3", "Phi 3", "Granite", "GLM",
    "Helium", "ERNIE 4.5", "Arcee", "Apertus", "NanoChat", "DiffLlama", "BitNet", "LFM 2", "T5", "T5 v1.1", "PaliGemma",
    *(f"{name}, {experts}" for experts in ("grouped_mm", "batched_mm") for name in (
        "Mixtral", "Qwen 3 MoE", "OLMoE", "GPT-OSS", "DeepSeek V2", "DeepSeek V3", "Qwen 2 MoE", "Granite MoE")),
]  # fmt: skip
#: Of those, what the norms inside of the blocks (of queries and keys, of what attention returns) are refused for.
INNER = ("no product reads what this norm returns", "which R cannot be folded into, and nothing else")


@pytest.mark.parametrize("row", [n if n == "GPT-2" else pytest.param(n, marks=pytest.mark.slow) for n in ORDER])
def test_a_row_is_what_its_record_says(row: str) -> None:
    found, recorded = measured(ORDER[row]), records()["rows"][row]
    assert {**found, "error": None} == {**recorded, "error": None}
    for name, bound in BOUNDS.items():
        assert found.get("error", {name: 0.0})[name] <= bound, name


def test_every_row_has_a_record_and_no_other_has() -> None:
    assert list(records()["rows"]) == list(ORDER)
    assert set(ROWS) < set(ORDER) and list(ORDER)[: len(FIRST)] == list(FIRST) == records()["first"]
    assert records()["bounds"] == BOUNDS


def test_the_recorded_errors_are_within_their_bounds() -> None:
    measured = [row["error"] for row in records()["rows"].values() if "error" in row]
    assert len(measured) >= 99
    for name, bound in BOUNDS.items():
        assert max(errors[name] for errors in measured) <= bound


@pytest.mark.parametrize("row", PRE_NORM)
def test_r1_and_r2_fold_where_rms_norms_stand_before_the_blocks(row: str) -> None:
    found = records()["rows"][row]["rotations"]
    for label in ("R1", "R2"):
        assert found[label]["folded"]["rows"] and found[label]["folded"]["columns"], label
    assert all(any(inner in reason for inner in INNER) for reason in found["R1"].get("refused", ())), found["R1"]
    assert "refused" not in found["R2"]
    streams = 2 if row.startswith(("T5", "PaliGemma")) else 1  # an encoder beside the decoder
    assert found["R1"].get("online", 0) <= 2 * streams and "online" not in found["R2"]


def test_every_reason_has_a_counter_example() -> None:
    """By the words that stay the same in it."""
    said = {
        f"{label}: {reason}"
        for row in records()["rows"].values()
        for label, cell in row.get("rotations", {}).items()
        for reason in cell.get("refused", ())
    }
    assert said and not {reason for reason in said if not any(known in reason for known in REASONS)}
