"""hf:, py: and .pt2 models: what loads, and what a damaged one is answered with."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fuseline.compiler.errors import UserError
from fuseline.models import load, logits_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama as save_pretrained writes it, without a tokenizer."""
    load("demo:tiny-llama").model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_hf_folder(folder: Path) -> None:
    loaded, original = load(f"hf:{folder}"), load("demo:tiny-llama")
    ids = torch.tensor([original.encode("The same model from a folder.")])
    assert torch.equal(loaded.logits_fn()(ids), original.logits_fn()(ids))


def test_hf_encoder_that_is_not_causal(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    loaded = load(f"hf:{tmp_path}")
    assert type(loaded.model).__name__ == "BertForMaskedLM"
    with torch.no_grad():
        assert logits_of(loaded.model(*loaded.example_args, **loaded.example_kwargs)).shape == (1, 32, 300)


def test_truncated_safetensors(folder: Path) -> None:
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as handle:
        handle.truncate(size - 1000)
    with pytest.raises(UserError) as raised:
        load(f"hf:{folder}")
    assert f"it is truncated: the header promises {size} bytes, the file has {size - 1000}" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc", "its first 8 bytes are no header length"),
        (struct.pack("<Q", 1000) + b"{}", "it is truncated: the header has 1000 bytes, the file 10"),
        (struct.pack("<Q", 4) + b"[{x]", "its header is corrupt"),
    ],
)
def test_corrupt_safetensors_header(folder: Path, content: bytes, message: str) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError) as raised:
        load(f"hf:{folder}")
    assert message in str(raised.value)


def test_a_missing_weight_is_not_filled_with_random_numbers(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .* model\.layers\.1\.mlp\.up_proj\.weight"):
        load(f"hf:{folder}")


def test_nan_weights_are_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError) as raised:
        load(f"hf:{folder}")
    assert raised.value.headline.endswith("not finite: model.layers.0.self_attn.q_proj.weight")
    assert "1 NaN, 0 infinite of 16384" in str(raised.value)


def test_a_missing_shard_is_named(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"lacks 1 of its 2 weight files"):
        load(f"hf:{folder}")


def test_a_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \.safetensors file"):
        load(f"hf:{folder}")


FACTORIES = """
import torch
from torch import nn

def good():
    return nn.Linear(4, 3), (torch.ones(2, 4),)

def bare():
    return nn.Linear(4, 3)

def wrong():
    return 5

def nan():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        layer.bias.fill_(float("nan"))
    return layer, (torch.ones(2, 4),)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder; its name is the test's own, since Python imports a name once."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


def test_factory(factories: str) -> None:
    loaded = load(f"py:{factories}:good", torch.float64)
    assert isinstance(loaded.model, nn.Linear) and loaded.tokenizer is None
    assert loaded.model.weight.dtype is torch.float64
    assert loaded.model(*loaded.example_args).shape == (2, 3), "floating-point example inputs follow the dtype"


def test_factory_of_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "not a package"
    folder.mkdir()
    (folder / "beside.py").write_text("WIDTH = 3")
    (folder / "my-model.py").write_text("from beside import WIDTH\n" + FACTORIES.replace("4, 3", "4, WIDTH"))
    path = list(sys.path)
    loaded = load(f"py:{folder}/my-model.py:good")
    assert loaded.model(*loaded.example_args).shape == (2, 3)
    assert type(loaded.model) is nn.Linear and sys.path == path
    with pytest.raises(UserError, match="did you mean 'good'"):
        load(f"py:{folder}/my-model.py:godo")


@pytest.mark.parametrize(
    ("text", "message"),
    [("import no_such_module_at_all", "No module named 'no_such_module_at_all'"), ("def good(:", "invalid syntax")],
)
def test_a_file_that_cannot_be_imported(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        load(f"py:{file}:good")
    assert f"cannot import {file}" in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bare", "returned a Linear without example inputs"),
        ("wrong", "returned int, not a module"),
        ("nan", "not finite: bias"),
        ("godo", "did you mean 'good'?"),
    ],
)
def test_factory_errors(factories: str, name: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load(f"py:{factories}:{name}")
    assert message in str(raised.value)


def test_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "linear.pt2"
    module, x = nn.Linear(4, 3), torch.randn(2, 4)
    torch.export.save(torch.export.export(module, (x,)), path)
    loaded = load(str(path))
    assert loaded.exported is not None
    assert torch.equal(loaded.model(x), module(x))
    with pytest.raises(UserError, match="dtype is fixed"):
        load(str(path), torch.float64)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"truncated or not a \.pt2 file"):
        load(str(path))
