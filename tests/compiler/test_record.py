"""Record: one file that tells what a pipeline did, also when it failed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fuseline
from fuseline import Pass, Pipeline, Program, UserError
from fuseline.compiler.action import Observer
from fuseline.compiler.errors import PassError, VerificationError
from fuseline.compiler.observe import Dump, Numerics, Record, Statistics
from fuseline.compiler.observe.record import finite, read_record, write_record
from fuseline.compiler.provenance import makers, source_line
from fuseline.compiler.sites import sites
from fuseline.compiler.structure import describe_value
from tests.helpers.models import Mlp

aten = torch.ops.aten
PIPELINE = "raise,quantize{weights=int8},fuse"


def mlp() -> Program:
    torch.manual_seed(0)
    return fuseline.capture(Mlp(), (torch.randn(4, 8),))


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Any], Program, Statistics, fuseline.Report]:
    record, statistics = Record(), Statistics()
    program, report = Pipeline(PIPELINE).run(mlp(), [Numerics(), statistics, record])
    return record.data, program, statistics, report


def names(data: dict[str, Any], stage: int) -> list[str]:
    return [data["nodes"][i]["name"] for i in data["stages"][stage]["nodes"]]


def test_every_stage_holds_its_graph(recorded: Any) -> None:
    data, program, _, report = recorded
    assert [s["name"] for s in data["stages"]] == ["captured", "raise", "quantize", "fuse"]
    assert names(data, 0) == [n.name for n in mlp().graph.nodes]
    assert [len(s["nodes"]) for s in data["stages"][1:]] == [p.nodes_after for p in report.passes]
    assert names(data, 3) == [n.name for n in program.graph.nodes]


def test_a_node_is_told_whole(recorded: Any) -> None:
    data, program, _, _ = recorded
    states = {data["nodes"][i]["name"]: data["nodes"][i] for i in data["stages"][-1]["nodes"]}
    names_by_id = {s["id"]: s["name"] for s in states.values()}
    assert any("region" in s for s in states.values())
    for node in program.graph.nodes:
        state = states[node.name]
        assert [names_by_id[i] for i in state["inputs"]] == [n.name for n in node.all_input_nodes]
        assert state.get("makers", []) == list(makers(node))
        assert state.get("line") == source_line(node)
        if "val" in node.meta:
            assert state["type"] == describe_value(node.meta["val"])
    assert {s["weight"]["text"] for s in states.values() if "weight" in s} >= {
        "norm",
        "pack(quantize(gate.weight, int8:sym).codes, int8:sym)",
        "quantize(gate.weight, int8:sym).scale",
    }


def test_lines_of_code_come_with_their_text(recorded: Any) -> None:
    data, _, _, _ = recorded
    place = next(s["line"] for s in data["nodes"] if s.get("target") == "aten.rsqrt.default")
    excerpt = data["excerpts"][place]
    line = excerpt["text"][int(place.rpartition(":")[2]) - excerpt["start"]]
    assert "torch.rsqrt" in line


def test_every_rewrite_is_an_action(recorded: Any) -> None:
    data, _, statistics, report = recorded
    assert [a["number"] for a in data["actions"]] == list(range(1, report.rewrites + 1))
    ids = {s["name"]: s["id"] for s in data["nodes"]}
    for told, action in zip(data["actions"], statistics.actions, strict=True):
        assert (told["rule"], told["site"], told["location"]) == (action.rule, action.site, action.location)
        assert told["root"] == ids[action.root.name]
        assert told["created"] == [ids[n.name] for n in action.created if not n._erased or n.name in ids]
        assert told["ms"] > 0
    assert {a["pass"] for a in data["actions"]} == {0, 1, 2}


def test_an_unchanged_node_is_told_once(recorded: Any) -> None:
    data, _, _, _ = recorded
    shared = set(data["stages"][0]["nodes"]) & set(data["stages"][1]["nodes"])
    assert len(shared) > 5
    for first, second in zip(data["stages"], data["stages"][1:]):
        before = {data["nodes"][i]["id"]: data["nodes"][i] for i in first["nodes"]}
        for position in set(second["nodes"]) - set(first["nodes"]):
            state = data["nodes"][position]
            assert before.get(state["id"]) != state


def test_passes_with_their_times_errors_and_refusals() -> None:
    record = Record()
    program = mlp()
    expected = {site: node.name for node, site in sites(program.graph).items()}
    _, report = Pipeline("quantize{weights=int8:g8}").run(program, [Numerics(), record], "full")
    (told,) = record.data["passes"]
    (kept,) = report.passes
    assert (told["ms"], told["verify_ms"], told["error"]) == (kept.ms, kept.verify_ms, kept.error)
    assert told["verify_ms"] > 0 and told["error"] > 0
    assert record.data["captured_error"] == report.captured_error
    assert {r["site"]: r["reason"] for r in told["refusals"]} == kept.refused
    ids = {s["id"]: s["name"] for s in record.data["nodes"]}
    for refusal in told["refusals"]:
        assert ids[refusal["node"]] == expected[refusal["site"]]


@dataclass(frozen=True)
class HalfWay(Pass):
    """Rewrites once and then fails."""

    name = "half-way"

    def run(self, program, rewriter):
        silu = next(n for n in program.graph.nodes if n.target is aten.silu.default)
        rewriter.rewrite(silu, [silu], lambda new: new(aten.relu.default, silu.args[0]), "relu")
        raise ValueError("no further")


def test_a_failing_pass_leaves_the_graph_it_got_to(tmp_path: Path) -> None:
    with pytest.raises(PassError):
        Pipeline([*Pipeline("quantize{weights=int8}").passes, HalfWay()]).run(mlp(), [Record(tmp_path)])
    data = read_record(tmp_path)
    assert data["failure"] == {
        "pass": "half-way", "text": "half-way", "error": "ValueError: no further", "rewrites": 1
    }  # fmt: skip
    assert not data["ended"] and len(data["passes"]) == 1
    targets = {data["nodes"][i]["target"] for i in data["stages"][-1]["nodes"]}
    assert "aten.relu.default" in targets and "aten.silu.default" not in targets


@dataclass(frozen=True)
class Stale(Pass):
    """Says a wrong type of what it makes."""

    name = "stale"

    def run(self, program, rewriter):
        silu = next(n for n in program.graph.nodes if n.target is aten.silu.default)
        rewriter.rewrite(silu, [silu], lambda new: new(aten.silu.default, silu.args[0]), "silu")
        new = next(n for n in program.graph.nodes if n.target is aten.silu.default)
        new.meta["val"] = new.meta["val"].double()


def test_what_the_verifier_refuses_is_recorded_too(tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        Pipeline([Stale()]).run(mlp(), [Record(tmp_path)], "full")
    data = read_record(tmp_path)
    assert not data["ended"] and data["failure"] is None
    assert [s["name"] for s in data["stages"]] == ["captured", "stale"]


class Skip(Observer):
    def allows(self, action):
        return action.number != 2


@pytest.mark.parametrize("first", [True, False])
def test_a_skipped_rewrite_is_no_rewrite(first: bool) -> None:
    record = Record()
    observers = [Skip(), record] if first else [record, Skip()]
    _, report = Pipeline("quantize{weights=int8}").run(mlp(), observers)
    done = [a["number"] for a in record.data["actions"] if not a["skipped"]]
    assert done == [n for n in range(1, report.rewrites + 1) if n != 2]
    assert [a["number"] for a in record.data["actions"] if a["skipped"]] == ([] if first else [2])


def test_the_file_lies_among_the_stages(tmp_path: Path) -> None:
    for _ in range(2):  # the second run finds the files of the first
        Pipeline(PIPELINE).run(mlp(), [Dump(tmp_path), Record(tmp_path)])
    data = read_record(tmp_path)
    assert all((tmp_path / stage["file"]).is_file() for stage in data["stages"])
    assert data["ended"]
    assert not list(tmp_path.glob("*.partial"))


def test_symbolic_sizes_are_told_with_their_hints() -> None:
    record = Record()
    sequence = torch.export.Dim("sequence", min=2, max=512)
    program = fuseline.capture(Mlp(), (torch.randn(24, 8),), dynamic=({0: sequence},))
    Pipeline("raise").run(program, [record])
    assert list(record.data["symbols"].values()) == [24]
    output = record.data["nodes"][record.data["stages"][0]["nodes"][-2]]
    assert output["bytes"] == 24 * 8 * 4 and "24" not in output["type"]


def test_json_has_no_infinity(tmp_path: Path) -> None:
    path = write_record(tmp_path, {"a": float("inf"), "b": [float("nan"), (-float("inf"), 1.5)]})
    strict = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert strict == {"a": "inf", "b": ["nan", ["-inf", 1.5]]} == finite(strict)


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no record.json[\s\S]*fuseline run MODEL -p PIPELINE --dump"):
        read_record(tmp_path)
    for text, message in [
        ("{", "is damaged"),
        ("[1]", "is not a record of a run"),
        ('{"format": "fuseline-record", "version": 99}', "has version 99, and this Fuseline reads 1"),
    ]:
        (tmp_path / "record.json").write_text(text)
        with pytest.raises(UserError, match=message):
            read_record(tmp_path)
