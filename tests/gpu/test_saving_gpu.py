"""Without originals on a GPU: kernels read the codes, the model moves, an artifact is loaded to any device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fuseline
from fuseline.originals import dropped
from tests.helpers.models import error, tiny_llama

pytestmark = pytest.mark.gpu
PIPELINE = "raise,quantize{weights=int8},fuse"
IDS = torch.arange(8)[None]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def optimized(keep: bool) -> torch.nn.Module:
    return fuseline.optimize(tiny_llama().cuda(), PIPELINE, keep_originals=keep)


@torch.no_grad()
def test_kernels_give_the_same_bits_without_originals() -> None:
    kept, lean = optimized(True), optimized(False)
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    for _ in range(4):
        assert torch.equal(kept.generate(IDS.cuda(), **settings), lean.generate(IDS.cuda(), **settings))
    assert {c.target for c in fuseline.reports(lean)} == {"triton"} and len(dropped(lean)) == 14


@torch.no_grad()
def test_a_model_without_originals_moves_and_comes_back() -> None:
    model, before = optimized(False), torch.cuda.memory_allocated()
    expected = model(IDS.cuda()).logits
    model.to("cpu")
    names = dropped(model)
    assert len(names) == 14 and all(p.device.type == "cpu" and p.isnan().all() for p in names.values())
    assert error(model(IDS).logits, expected.cpu()) < 1e-4  # in eager
    assert torch.cuda.memory_allocated() < before
    model.cuda()
    assert torch.equal(model(IDS.cuda()).logits, expected)


@torch.no_grad()
def test_an_artifact_belongs_to_no_device(tmp_path: Path) -> None:
    model = optimized(False)
    expected = model(IDS.cuda()).logits
    folder = fuseline.save(model, tmp_path / "out")
    torch.compiler.reset()
    loaded = fuseline.load(folder, device="cuda")
    assert next(loaded.parameters()).is_cuda and torch.equal(loaded(IDS.cuda()).logits, expected)
    assert error(fuseline.load(folder, device="cpu")(IDS).logits, expected.cpu()) < 1e-4
    again = fuseline.save(loaded, tmp_path / "again")
    (first,), (second,) = folder.glob("*.safetensors"), again.glob("*.safetensors")
    assert first.name == second.name and first.read_bytes() == second.read_bytes()
