"""The table of who is right: which of its cases AutoSP's rules are right in, and why not in the others."""

from __future__ import annotations

import math

import autosp_rules


def test_rules_are_right_where_nothing_is_shifted_or_masked() -> None:
    found = {row["case"]: row for row in autosp_rules.rows(None)}
    assert [name for name, row in found.items() if row["right"] == "AutoSP"] == ["labels that nobody shifts"]
    assert found["prompt of half the sequence"]["AutoSP's rules"] == "nan"  # the first ranks have no label
    assert "exchanged twice" in found["keys that are values"]["AutoSP's rules"]
    for name in ("2 key heads", "1 key head", "9 heads"):
        assert "error: no view of" in found[name]["AutoSP's rules"]


def test_who_is_right_is_computed() -> None:
    """A loss or a gradient that is off is not right, whoever computed it."""
    losses = {row["case"]: float(row["one process"]) for row in autosp_rules.rows(None)}
    exact = {}
    for name in autosp_rules.CASES:
        model, _, inputs, _ = autosp_rules.case_of(name)
        exact[name] = {"loss": model(**inputs).item(), "off": 0.0}
        assert math.isclose(exact[name]["loss"], losses[name], abs_tol=1e-4)
    assert all("Fuseline" in row["right"] for row in autosp_rules.rows(exact))
    off = {name: {**found, "off": 1e-6} for name, found in exact.items()}
    assert not any("Fuseline" in row["right"] for row in autosp_rules.rows(off))
