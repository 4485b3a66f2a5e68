"""A cache of codes under transformers' models: generate(), steps against prompts, bytes, errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, LlamaConfig

import fuseline
from fuseline import QuantizedCache, UserError
from fuseline.models import load
from fuseline.quantized_cache import side
from tests.codegen.regions import error

SETTINGS: dict[str, dict[str, Any]] = {
    "int8": {"keys": "int8:channel:g32", "values": "int8:token", "window": 16, "block": 64},
    "kivi": {"keys": "int4:channel:g32", "values": "int4:token:g16", "window": 0, "block": 64},
    "tada": {"keys": ["int4:token", "int8:token"], "values": "int2:token", "centred": True, "block": 128},
    "fp8": {"keys": "fp8:token", "values": "fp8:token:g16", "window": 40, "block": 32},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return load("demo:tiny-llama").model


def ids(length: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(256, (batch, length), generator=generator)


@torch.no_grad()
def logits(run: Any, cache: Any, given: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    found, at = [], 0
    for cut in [*cuts, given.shape[1]]:
        found.append(run(given[:, at:cut], past_key_values=cache).logits)
        at = cut
    return torch.cat(found, 1)


def test_generate_gives_the_tokens_of_an_exact_cache(model: Any) -> None:
    """8 bits are enough here; the cache is reset and used again, and beams reorder it."""
    cache = QuantizedCache(model.config, 512, **SETTINGS["int8"])
    settings = {"max_new_tokens": 12, "do_sample": False, "disable_compile": True}
    for given in (ids(200), ids(131)):
        expected = model.generate(given, **settings)
        assert torch.equal(model.generate(given, past_key_values=cache, **settings), expected)
        cache.reset()
    beams = QuantizedCache(model.config, 256, **SETTINGS["int8"])
    given, more = ids(100), {"num_beams": 3, **settings}
    assert torch.equal(model.generate(given, past_key_values=beams, **more), model.generate(given, **more))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_cache_does_not_depend_on_how_tokens_arrive(model: Any, name: str) -> None:
    """In float64, with what the first pass left: blocks are coded by their own tokens alone."""
    wide = load("demo:tiny-llama", torch.float64).model
    caches = [QuantizedCache(wide.config, 300, **SETTINGS[name]) for _ in range(2)]
    k = [torch.randn(2, 2, 220, 32, dtype=torch.float64) for _ in range(2)]
    for cuts, cache in zip(([], [1, 2, 80, 81, 82, 190]), caches, strict=True):
        at = 0
        for cut in [*cuts, 220]:
            for layer in range(2):
                keys, values = cache.update(*(x[:, :, at:cut] for x in k), layer)
            at = cut
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*(layer.tensors() for layer in layers), strict=True))
    assert keys.shape == (2, 2, cache.layers[0].max_cache_len, 32) and (keys[:, :, 220:] == 0).all()
    scale = side(cache.layers[0], False).scale.max()
    assert 0 < (cache.layers[0].update(*(x[:, :, :0] for x in k))[0][:, :, :220] - k[0]).abs().max() <= 40 * scale


LONG = [pytest.param(name, [120, 147, 148, 149], marks=pytest.mark.slow) for name in ("kivi", "tada")]


@pytest.mark.parametrize(("name", "cuts"), [("kivi", [149]), *LONG])
def test_a_compiled_model_attends_over_the_codes(name: str, cuts: list[int]) -> None:
    torch.compiler.reset()
    plain, fused = (load("demo:tiny-llama").model for _ in range(2))
    given = ids(150, 2)
    expected = logits(plain, QuantizedCache(plain.config, 200, **SETTINGS[name]), given, cuts)
    optimized = fuseline.optimize(fused, "raise,fuse", target="eager")
    found = logits(optimized, QuantizedCache(fused.config, 200, **SETTINGS[name]), given, cuts)
    assert error(found, expected) < 1e-5
    for one in fuseline.reports(optimized):
        assert one.report["fuse"].rules["cache"] == 2 and not one.report["fuse"].refused
        graph = one.program.module
        targets = {n.target for n in graph.graph.nodes}
        assert torch.ops.fuseline.cache_read.default not in targets
        assert torch.ops.fuseline.cache_write.default not in targets  # they stand in the regions
        region = [n.target._opname for n in graph.cached_0.graph.nodes if n.op == "call_function"]
        assert region == ["cache_write", "cache_write", "cache_attention"]


def test_memory_shrinks(model: Any) -> None:
    """Codes, scales, lows and the ring, as they are allocated."""
    cache = QuantizedCache(model.config, 4096, "int4:channel:g64", "int4:token", window=64, block=64)
    model.bfloat16()
    try:
        with torch.no_grad():
            model(ids(3), past_key_values=cache)
    finally:
        model.float()
    exact = 2 * 2 * 2 * 4096 * 32 * 2  # layers, keys and values, heads, tokens, channels, bytes
    keys, values, ring = 0.25 + 2 / 64, 0.25 + 2 / 32, 128 / 4096
    assert cache.nbytes() == pytest.approx(exact * ((keys + values) / 2 + ring))
    assert QuantizedCache.kivi(model.config, 64).layers[0].block == 128
    assert str(QuantizedCache.minikv(model.config, 64).layers[1].schemes[0]) == "int2:channel:g16"


def test_padding_on_the_left(model: Any) -> None:
    given = ids(90, 2)
    mask = torch.ones_like(given)
    mask[0, :31] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "disable_compile": True}
    cache = QuantizedCache(model.config, 128, **SETTINGS["int8"])
    assert torch.equal(model.generate(given, past_key_values=cache, **settings), model.generate(given, **settings))


def test_errors_say_what_to_do(model: Any) -> None:
    config = model.config
    for arguments, words in (
        ({"keys": "int3:token"}, "holds no codes of 'int3'"),
        ({"keys": "int4:chanel"}, "no part 'chanel'"),
        ({"keys": ["int4:token"]}, "1 schemes, the model 2 layers"),
        ({"block": 48}, "block=48: there are 32, 64, 128"),
    ):
        with pytest.raises(UserError, match=words):
            QuantizedCache(config, 64, **arguments)
    for arguments, words in (
        ({"values": "int4:channel"}, "values take a scale a token"),
        ({"keys": "int4:token:g24"}, "groups of 24 channels do not divide heads of 32"),
        ({"keys": "int4:channel:g48"}, "groups of 48 tokens do not divide blocks of 128"),
    ):
        with pytest.raises(UserError, match=words), torch.no_grad():
            model(ids(3), past_key_values=QuantizedCache(config, 64, **arguments))
    sliding = LlamaConfig(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(UserError, match="layers of sliding_attention"):
        QuantizedCache(sliding, 64)
    assert len(QuantizedCache(GemmaConfig(num_hidden_layers=3), 64)) == 3
    with pytest.raises(UserError, match="stays on its device"):
        QuantizedCache(config, 64).layers[0].offload()


def test_without_transformers_the_name_says_what_is_missing() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; sys.modules['transformers.cache_utils'] = None\n"
        "import fuseline\ntry: fuseline.QuantizedCache\nexcept fuseline.UserError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "not installed" in done.stdout, done.stderr
