"""Tensors that a checkpoint has too many or too few of, in plain and in compressed-tensors checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fuseline
from fuseline.models import load
from fuseline.models.coded import CodedLinear
from fuseline.models.compressed_linear import CompressedLinear, Layout
from fuseline.models.packing import pack_words

pytest.importorskip("transformers")

WRITTEN = Path(__file__).parent / "llm_compressor"
LINEAR = "model.layers.0.mlp.up_proj"


def refused(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    """What loading says of a copy of a checkpoint with its tensors changed."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(fuseline.UserError) as raised:
        load(f"hf:{folder}")
    return str(raised.value)


def copy(folder: Path) -> Path:
    shutil.copytree(WRITTEN, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    return folder


def test_codes(tmp_path: Path) -> None:
    lost = refused(copy(tmp_path / "lost"), lambda t: t.pop(f"{LINEAR}.weight_scale"))
    assert f"lacks 1 weights that LlamaForCausalLM needs: {LINEAR}.weight_scale" in lost
    more = refused(copy(tmp_path / "more"), lambda t: t.update({f"{LINEAR}.weight_g_idx": torch.ones(3)}))
    assert f"has 1 tensors that LlamaForCausalLM has no place for: {LINEAR}.weight_g_idx" in more
    other = refused(copy(tmp_path / "other"), lambda t: t.update({f"{LINEAR}.weight_scale": torch.ones(4, 2)}))
    assert f"{LINEAR}.weight_scale: [4, 2], not [48, 2]" in other


def test_plain_weights(tmp_path: Path) -> None:
    model = load("demo:tiny-llama").model
    model.save_pretrained(tmp_path)
    more = refused(tmp_path, lambda t: t.update({f"{LINEAR}.bias": torch.ones(3)}))
    assert f"has 1 tensors that LlamaForCausalLM has no place for: {LINEAR}.bias" in more
    other = refused(tmp_path, lambda t: (t.pop(f"{LINEAR}.bias"), t.update({f"{LINEAR}.weight": torch.ones(3, 4)})))
    assert f"{LINEAR}.weight: [3, 4], not [384, 128]" in other


def test_channels_ordered_by_their_groups() -> None:
    """weight_g_idx, as releases of compressed-tensors before 0.20 wrote it."""
    out, channels, size = 6, 16, 4
    module = CompressedLinear(torch.nn.Linear(channels, out), Layout(True, 4, size, True, ordered=True), None)
    codes = torch.randint(-8, 8, (out, channels), dtype=torch.int8)
    groups = (torch.randperm(channels) // size).to(torch.int32)
    state = {
        "weight_packed": pack_words(codes, 4),
        "weight_shape": torch.tensor(codes.shape),
        "weight_scale": torch.rand(out, channels // size),
        "weight_g_idx": groups,
        "bias": torch.randn(out),
    }
    module.load_state_dict(state, assign=True)
    made, x = module.finished("w"), torch.randn(3, channels)
    assert isinstance(made, CodedLinear)
    weight = codes.double() * state["weight_scale"].double()[:, groups.long()]
    expected = torch.nn.functional.linear(x.double(), weight, state["bias"].double())
    assert (made(x).double() - expected).abs().max() < 1e-5
