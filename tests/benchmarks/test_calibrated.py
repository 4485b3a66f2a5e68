"""The benchmark of quantization's methods in its small form."""

from __future__ import annotations

import json
from pathlib import Path

import calibrated
import pytest

pytest.importorskip("transformers")


@pytest.mark.slow
def test_a_tiny_model(tmp_path: Path) -> None:
    path = tmp_path / "calibrated.json"
    words = "--device cpu --model demo:tiny-llama --weights int4:g64:sym --methods rtn gptq --calibration 4 --windows 2"
    calibrated.main([*words.split(), "--length", "64", "--json", str(path)])
    nearest, gptq = json.loads(path.read_text())["rows"]
    assert not {"failed", "skipped"} & (nearest.keys() | gptq.keys())
    assert nearest["recovered"] == 0 and nearest["original"] == gptq["original"]
    assert gptq["recovered"] == pytest.approx(1 - gptq["cost"] / nearest["cost"])
    assert gptq["quantized"] != nearest["quantized"] and "method=gptq" in gptq["pipeline"]
