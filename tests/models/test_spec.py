"""A model spec says what it is; a wrong one is answered with the nearest right one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.compiler.errors import UserError
from fuseline.models import load, logits_of, parse_dtype


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("demo:smolm2", "did you mean 'smollm2'?"),
        ("dmeo:smollm2", "did you mean 'demo'?"),
        ("smollm2", "did you mean 'demo:smollm2'?"),
        ("weights.gguf", "did you mean 'gguf:weights.gguf'?"),
        ("nothing", "'nothing' is not a model"),
        ("gguf:/nowhere/x.gguf", "no such file: /nowhere/x.gguf"),
        ("/nowhere/x.pt2", "no such file: /nowhere/x.pt2"),
        ("hf:/nowhere", "/nowhere has no config.json"),
        ("py:json", "not of the form py:package.module:factory"),
        ("py:no_such_module_at_all:make", "cannot import 'no_such_module_at_all'"),
        ("py:fractions:Fractoin", "did you mean 'Fraction'?"),
        ("model.py", "did you mean 'py:model.py:FUNCTION'?"),
        ("model.py:make", "did you mean 'py:model.py:make'?"),
        ("py:model.py", "try: py:model.py:FUNCTION"),
        ("py:/nowhere/model.py:make", "no such file: /nowhere/model.py"),
    ],
)
def test_wrong_spec(spec: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load(spec)
    assert message in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_folder_is_taken_for_hf(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"did you mean 'hf:{tmp_path}'"):
        load(str(tmp_path))


def test_dtype_names() -> None:
    assert parse_dtype("bfloat16") is torch.bfloat16
    assert parse_dtype(None) is None
    with pytest.raises(UserError, match="did you mean 'bfloat16'"):
        parse_dtype("bflaot16")


@pytest.mark.parametrize("spec", ["demo:tiny-llama", "demo:tiny-decoder"])
def test_demo_models_are_the_same_every_time(spec: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = load(spec)
    assert torch.equal(torch.get_rng_state(), state), "loading a model must not advance the global generator"
    torch.manual_seed(2)
    second = load(spec)
    ids = torch.tensor([first.encode("Same weights, same logits.")])
    a, b = first.logits_fn()(ids), second.logits_fn()(ids)
    assert a.shape == (1, ids.shape[1], 512)
    assert torch.equal(a, b)
    assert not first.model.training


def test_dtype_is_applied() -> None:
    model = load("demo:tiny-llama", torch.bfloat16).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_bytes_are_tokens() -> None:
    loaded = load("demo:tiny-decoder")
    assert loaded.encode("Ä1") == [0xC3, 0x84, 0x31]
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.decode([0xC3, 0x84, 0x31, 300]) == "Ä1"


def test_logits_of_each_kind_of_output() -> None:
    x = torch.ones(2)
    assert logits_of(x) is x
    assert logits_of((x, None)) is x
    assert logits_of({"scores": x}) is x


def test_dynamic_sizes_are_named_in_the_order_of_the_signature() -> None:
    loaded = load("demo:tiny-llama")
    shapes = loaded.dynamic_shapes()
    assert shapes is not None
    assert set(shapes) == {"input_ids", "use_cache"}
    assert set(shapes["input_ids"]) == {1} and shapes["use_cache"] is None
    exported = torch.export.export(
        loaded.model, loaded.example_args, loaded.example_kwargs, dynamic_shapes=shapes, strict=False
    )
    ids = next(n for n in exported.graph.nodes if n.op == "placeholder" and n.name.startswith("input_ids"))
    assert isinstance(ids.meta["val"].shape[1], torch.SymInt)
