"""The benchmark of routed experts: its layers, its rows and the tiles it tries, on a CPU through the ops' twins."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import moe_layer
import pytest
import torch
from experts import layer as layers
from experts.layer import Candidate, Layer

TINY = Layer("tiny", "bf16")


@pytest.mark.parametrize("kind", layers.KINDS)
def test_a_module_launches_its_kernels_for_every_number_of_tokens(kind: str, tmp_path: Path) -> None:
    layer = Layer("tiny", kind)
    (candidate,) = layers.emitted(layer, 4, False, tmp_path)
    tags = {
        m: [name.removeprefix("bench_") for name, _, _ in layers.launches(candidate, layer, m)] for m in (1, 4, 4096)
    }
    route = "route_many" if kind == "pairs" else "route_few"
    assert tags[1] == ["up_one", "down_one", *(["sum"] if kind in layers.CODES else [])]
    assert tags[4] == ["route_few", "up_few", "down_few", "sum"]
    assert tags[4096] == [route, "up_many", "down_many", "sum"]
    assert [layers.regime(layer, candidate.tiles, m) for m in (4, 4096)] == ["few", "many"]


@pytest.mark.parametrize("m", [1, 16, 4096])
def test_other_tiles_are_tried_once_each(m: int) -> None:
    found = list(layers.candidates(TINY, m, True))
    assert len(found) == len(set(found)) > 8
    assert {varied for varied, _ in found} >= {"", "up", "down"}


def test_pairs_are_half_of_the_experts() -> None:
    plain, pairs = (Layer("tiny", kind).weights("cpu") for kind in ("bf16", "pairs"))
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors[:2])
    assert 2 * size(pairs) == size(plain) == 8 * TINY.expert_bytes
    indices = torch.tensor([[0, 1], [0, 3]])
    assert (TINY.touched(indices), Layer("tiny", "pairs").touched(indices)) == (3, 2)


def test_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Floors, checks and ratios, with the ops' twins in the place of kernels; and what a wrong kernel leads to."""
    options = argparse.Namespace(device="cpu", kinds=["bf16", "pairs", "fp8"], peers=["grouped_mm", "batched_mm"])
    run = argparse.Namespace(rates={"bandwidth": 1e9, "matmul_flop_s": 1e12})
    kind_of = {Path("bf16"): TINY, Path("pairs"): Layer("tiny", "pairs"), Path("fp8"): Layer("tiny", "fp8")}

    def twin(candidate: Candidate, wrong: float = 1.0) -> Any:
        def call(*given: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            result = kind_of[candidate.path].call(*given) * wrong
            return result if out is None else out.copy_(result)

        return call

    monkeypatch.setattr(Candidate, "call", property(twin))
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    tiles = next(tiles for _, tiles in layers.candidates(TINY, 4, False))
    tried = {kind: [Candidate(tiles, "", Path(kind))] for kind in options.kinds}
    bench, row = moe_layer.Bench("tiny", options, run, tmp_path), {}  # type: ignore[arg-type]
    bench.fill(4, tried, row)
    assert row["floor_us"] == pytest.approx(row["bf16_touched"] * TINY.expert_bytes / 1e9 * 1e6)
    assert 0 < row["pairs_touched"] <= 4 and row["bf16_error"] < 1e-2 and row["pairs_error"] < 1e-2
    sizes = {k: sum(t.numel() * t.element_size() for t in w) for k, w in bench.weights.items()}
    assert sizes["fp8"] == 8 * Layer("tiny", "fp8").expert_bytes
    assert {
        "fp8_to_bf16",
        "to_batched_mm",
        "grouped_mm_us",
        "batched_mm_us",
        "of_floor",
        "to_grouped_mm",
        "pairs_to_bf16",
    } <= row.keys()
    monkeypatch.setattr(Candidate, "call", property(lambda candidate: twin(candidate, 1.1)))
    with pytest.raises(RuntimeError, match="bf16: RuntimeError: error"):
        bench.fill(4, tried, {})
