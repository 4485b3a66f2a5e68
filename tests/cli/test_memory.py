"""`fuseline memory` and `fuseline plan`."""

import json

import pytest

from fuseline.cli import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return ended.value.code, capsys.readouterr()


def test_memory_of_a_shape(capsys, tmp_path):
    data, plot = tmp_path / "memory.json", tmp_path / "memory.svg"
    code, said = run(
        capsys, "memory", "shape:smollm2-135m", "--seq", "4096", "--points", "1", "--json", str(data), "--plot",
        str(plot),
    )  # fmt: skip
    assert code == 0, said.err
    assert "peak of activations and gradients" in said.out and "attention" in said.out and "next: " in said.out
    found = json.loads(data.read_text())
    assert found["peak"] < found["peak_kept"] and found["lengths"] == []
    kept = {row["why"] for row in found["activations"] if row["decision"] == "kept"}
    assert {"a block's input", "attention's result"} <= kept
    assert found["longest"] > 4096 and "polygon" in plot.read_text()
    names = [row["name"] for row in found["curve"]]
    assert names[0] == "smallest" and names[-1] == "none"
    times = {row["name"]: row["seconds"] for row in found["curve"]}
    assert times["none"] == 0 < times["budget"] < times["full"]


@pytest.mark.slow
def test_plans_by_the_length(capsys, tmp_path):
    data = tmp_path / "memory.json"
    code, said = run(
        capsys, "memory", "shape:smollm2-135m", "-p", "checkpoint{policy=budget,memory=12GB}", "--memory", "12GB",
        "--seq", "8192", "--points", "0", "--lengths", "2", "--json", str(data),
    )  # fmt: skip
    assert code == 0, said.err
    assert "the fastest within 12GB by the length" in said.out
    found = json.loads(data.read_text())
    first, second = found["lengths"]
    assert first["first"] == 8192 and second["first"] == first["last"] + 1 and second["share"] > first["share"]
    assert found["peak"] + found["owned"] <= 12e9  # parameters of all layers count, not of those that were traced


def test_plan_of_a_shape(capsys, tmp_path):
    data = tmp_path / "plan.json"
    code, said = run(
        capsys, "plan", "shape:smollm2-135m", "--gpus", "3", "--memory", "24GB", "--seq", "65536", "--json", str(data)
    )
    assert code == 0, said.err
    assert "·S" in said.out and "S = (M - " in said.out and "the fastest that fits" in said.out
    found = json.loads(data.read_text())
    assert {row["degree"] for row in found["rows"]} == {1, 3}
    assert found["fastest"]["peak"] <= 24e9
    assert {row["kind"] for row in found["rows"]} == {"-", "ulysses", "ring"}
    kind, degree = found["fastest"]["kind"], found["fastest"]["degree"]
    assert degree == 1 or f"raise,sequence-parallel{{degree={degree},kind={kind}}}" in said.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "shape:llama-3.1-7b"], "did you mean 'llama-3.1-70b'"),
        (["plan", "shape:llama-3.1-8b", "--memory", "much"], "memory is a size"),
        (["plan", "shape:llama-3.1-8b", "--device", "h300"], "unknown device 'h300'"),
        (["memory", "shape:llama-3.1-8b", "-p", "raise"], "has no checkpoint pass"),
        pytest.param(  # known once the model is traced
            ["memory", "shape:llama-3.1-8b", "-p", "checkpoint{memory=3GB}"], "takes no memory", marks=pytest.mark.slow
        ),
    ],
)
def test_mistakes_are_explained(capsys, arguments, message):
    code, said = run(capsys, *arguments)
    assert code == 2 and message in said.err
