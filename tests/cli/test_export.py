"""`fuseline export`: what it prints, what it writes, and what it refuses before it loads anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")

PIPELINE = "raise,rotate{r1,r2,untie}"


def test_a_checkpoint_is_written_and_compared(cli: Callable, tmp_path: Path) -> None:
    out, data = tmp_path / "out", tmp_path / "data.json"
    result = cli("export", "demo:tiny-llama", "-p", PIPELINE, "-o", str(out), "--json", str(data))
    assert result.code == 0, result.err
    assert "16 changed, 5 norm weights folded away, 0 as they were" in result.out
    assert "checked    loaded again, the outputs differ by" in result.out
    assert f"next: fuseline run hf:{out}" in result.out.replace("\n  ", " ") or f"hf:{out}" in result.out
    record = json.loads(data.read_text())
    assert record["pipeline"] == PIPELINE and record["error"] < 1e-5 and record["transforms"] is None
    assert record["rotations"] == json.loads((out / "fuseline_rotations.json").read_text())["rotations"]
    assert [p["name"] for p in record["passes"]] == ["raise", "rotate"]
    again = cli("export", "demo:nothing", "-p", PIPELINE, "-o", str(out))
    assert again.code == 2 and "exists already" in again.err, "before a model is looked for"


@pytest.mark.slow
def test_no_check_and_no_pipeline(cli: Callable, tmp_path: Path) -> None:
    result = cli("export", "demo:tiny-llama", "-p", "raise,rotate{r4}", "-o", str(tmp_path / "out"), "--no-check")
    assert result.code == 0 and "unchecked  check=False" in result.out
    assert "R4 (random-hadamard 384): transform_config" in result.out
    assert cli("export", "demo:tiny-llama", "-o", str(tmp_path / "other")).code == 2


def test_a_refusal_is_an_error_with_a_pipeline(cli: Callable, tmp_path: Path) -> None:
    result = cli("export", "demo:tiny-decoder", "-p", PIPELINE, "-o", str(tmp_path / "out"))
    assert result.code == 2 and "no class of transformers" in result.err


@pytest.mark.slow
def test_quantized_weights(cli: Callable, tmp_path: Path) -> None:
    pipeline = "quantize{weights=int4:g32,only=*.mlp.*},quantize{weights=int8,activations=int8,skip=*.mlp.*}"
    wanted = ["export", "demo:tiny-llama", "-p", pipeline, "-o", str(tmp_path / "out"), "--no-check"]
    plain = cli(*wanted)
    assert plain.code == 2 and "a plain checkpoint has no place" in plain.err and "compressed-tensors" in plain.err
    result = cli(*wanted, "--format", "compressed-tensors", "--json", str(tmp_path / "data.json"))
    assert result.code == 0, result.err
    printed = " ".join(result.out.split())
    assert "pack-quantized, weights int4:g32:asym of 6 linears" in printed
    assert "int-quantized, weights int8:channel:sym, inputs int8:token:sym of 8 linears" in printed
    assert "1 linears as they were: lm_head" in printed
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written == json.loads((tmp_path / "data.json").read_text())["quantization"]
