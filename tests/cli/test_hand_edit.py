"""A norm broken by hand in a dumped stage: `compare` names the node, `why` names what the rule missed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")


def hunt(cli: Callable, folder: Path, model: str, norms: int, broken: int) -> None:
    """Dump, edit one norm's square into a cube, compare, ask why; then put it right again."""
    assert cli("opt", model, "-p", "raise,fuse", "--dump", str(folder / "dump")).code == 0
    stage = folder / "dump" / "000_captured.py"
    text = stage.read_text()
    squares = re.findall(r"^ +(\w+) = torch\.ops\.aten\.pow\.Tensor_Scalar\(.*, 2\)", text, re.MULTILINE)
    assert len(squares) == norms
    node = squares[broken]
    edited, count = re.subn(rf"(\b{node} = .*), 2\)", r"\1, 3)", text)
    assert count == 1
    stage.with_name("edited.py").write_text(edited)

    compared = cli("compare", str(stage), str(stage.with_name("edited.py")), "--json", "-")
    data = json.loads(compared.out)
    assert compared.code == 1 and data["first"]["node"] == node, compared.err
    assert [edit["node"] for edit in data["rewrites"] if edit["verdict"] not in ("rounding", "below rounding")] == [
        node
    ]
    assert f"first divergence: node '{node}'" in compared.err

    asked = cli("why", "raise/RMSNorm", node, str(stage.with_name("edited.py")), "--json", "-")
    (miss,) = [m for e in json.loads(asked.out)["explanations"] for m in e["misses"]]
    assert asked.code == 1
    assert [(p["node"], p["text"]) for p in miss["problems"]] == [(node, "expected the number 2, found 3")]

    found = cli("opt", str(stage.with_name("edited.py")), "-p", f"raise{{expect=RMSNorm:{norms}}}")
    assert found.code == 2 and f"made {norms - 1} rewrites, where {norms} are expected" in found.err
    assert cli("compare", str(stage), "-p", "raise").code == 0


@pytest.mark.slow
def test_one_norm_of_a_tiny_model(cli: Callable, tmp_path: Path) -> None:
    hunt(cli, tmp_path, "demo:tiny-llama", norms=5, broken=2)


@pytest.mark.slow
def test_one_of_the_61_norms_of_smollm2(cli: Callable, tmp_path: Path) -> None:
    hunt(cli, tmp_path, "demo:smollm2", norms=61, broken=36)
