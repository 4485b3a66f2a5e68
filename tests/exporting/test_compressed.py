"""Quantized checkpoints: what compressed-tensors and transformers read in them is what Fuseline computes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import fuseline
from fuseline import UserError
from fuseline.compiler.precision import error
from fuseline.compiler.schemes import Scheme
from fuseline.exporting.compressed import format_of, tensors
from fuseline.models.packing import WIDTHS, pack_words, unpack_words

pytest.importorskip("transformers")

import transformers

from tests.exporting.plain import config_of, logits, model_of, tensors_of
from tests.families.decoders import build

needs_package = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install compressed-tensors",
)
FORMAT = "compressed-tensors"


def model_in(dtype: torch.dtype, folder: Path) -> torch.nn.Module:
    """A tiny Llama, loaded: `to(dtype)` would round the frequencies of its positions too."""
    model_of("Llama").save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def quantization_of(folder: Path) -> dict[str, Any]:
    return config_of(folder)["quantization_config"]


shapes = st.tuples(st.integers(1, 40), st.integers(1, 5).map(lambda k: 8 * k))


@given(st.sampled_from(WIDTHS), st.tuples(st.integers(1, 70), st.integers(1, 70)), st.sampled_from((0, 1)))
@settings(max_examples=60, deadline=None)
def test_words(bits: int, shape: tuple[int, int], dim: int) -> None:
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8)
    words = pack_words(codes, bits, dim)
    assert words.dtype == torch.int32 and words.shape[dim] == -(-shape[dim] * bits // 32)
    assert torch.equal(unpack_words(words, bits, shape[dim], dim), codes)


@needs_package
@given(st.sampled_from(WIDTHS), st.tuples(st.integers(1, 70), st.integers(1, 70)), st.sampled_from((0, 1)))
@settings(max_examples=60, deadline=None)
def test_words_are_theirs(bits: int, shape: tuple[int, int], dim: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=torch.int8)
    words = pack_words(codes, bits, dim)
    assert torch.equal(words, pack_to_int32(codes, bits, packed_dim=dim))
    assert torch.equal(unpack_from_int32(words, bits, torch.Size(shape), packed_dim=dim), codes)


@needs_package
@given(
    shapes,
    st.sampled_from((4, 8)),
    st.sampled_from((0, 4, 8)),
    st.booleans(),
    st.booleans(),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
@settings(max_examples=80, deadline=None)
def test_their_decompressor_gives_our_weight(
    shape: tuple[int, int], bits: int, group: int, symmetric: bool, alone: bool, dtype: torch.dtype
) -> None:
    """To the bit, in both formats."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    from fuseline.exporting.quantization import Coded

    weight = torch.randn(shape).to(dtype)
    scheme, inputs = Scheme(f"int{bits}", group, symmetric), None if alone else Scheme("int8")
    name = format_of(scheme, inputs)
    stored = tensors(name, scheme, scheme.quantize(weight), weight.shape)
    described = QuantizationScheme.model_validate(Coded(name, scheme, inputs).group(["Linear"]))
    theirs = BaseCompressor.get_value_from_registry(name).decompress(stored, described)["weight"]
    assert theirs.dtype == dtype and torch.equal(theirs, scheme.rounded(weight, 1.0))


ROTATED = "raise,rotate{r1,r2,untie}"
MIXED = f"{ROTATED},quantize{{weights=int8:asym,only=*.mlp.*|lm_head}},quantize{{weights=int4:g16,only=*_proj}}"
#: Pipeline, dtype → the format.
WEIGHTS = {
    ("quantize{weights=int4:g32}", torch.bfloat16): "pack-quantized",
    ("quantize{weights=int8,skip=*.k_proj}", torch.float32): "pack-quantized",
    (MIXED, torch.bfloat16): "pack-quantized",
}
#: Rounded as compressed-tensors does it in float32: with zero points, by groups or tokens.
ROUNDED = (
    "raise,quantize{weights=int8,activations=int8:asym,keys=int8:asym,values=int8:asym}",
    "quantize{weights=int4:g32,activations=int8:g32:asym,only=*.mlp.*},quantize{weights=int8,skip=*.mlp.*}",
)


def both(pipeline: str, dtype: torch.dtype, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the checkpoint in transformers, and of the model that Fuseline optimized."""
    model = model_in(dtype, path / "model")
    written = fuseline.export(model, path / "out", pipeline, format=FORMAT)
    assert written.unchecked is None and written.error is not None and written.error < 1e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(path / "out").eval()
    assert type(again) is type(model) and again.dtype == dtype
    return logits(again), logits(fuseline.optimize(model, pipeline))


@needs_package
@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if MIXED in c else pytest.mark.slow) for c in WEIGHTS])
def test_transformers_gives_our_logits(case: tuple[str, torch.dtype], tmp_path: Path) -> None:
    assert error(*both(*case, tmp_path)) < 1e-5
    assert quantization_of(tmp_path / "out")["format"] == WEIGHTS[case]


@needs_package
@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ROUNDED)
def test_transformers_rounds_inputs_and_caches(pipeline: str, tmp_path: Path) -> None:
    assert error(*both(pipeline, torch.float32, tmp_path)) < 1e-5


@needs_package
@pytest.mark.slow
def test_symmetric_rounding_is_the_readers_own(tmp_path: Path) -> None:
    """compressed-tensors divides the range by 127.5, Fuseline by 127: as far apart as rounding is from none."""
    theirs, ours = both("quantize{weights=int8,activations=int8}", torch.float32, tmp_path)
    assert 1e-4 < error(theirs, ours) < 5e-2


@pytest.mark.slow
def test_the_folder(tmp_path: Path) -> None:
    """Read without the package: the configuration, and codes that stand for our weights."""
    model = model_of("Llama")
    written = fuseline.export(model, tmp_path / "out", MIXED, format=FORMAT, check=False)
    config, stored = quantization_of(tmp_path / "out"), tensors_of(tmp_path / "out")
    assert config == written.quantization
    assert (config["quant_method"], config["quantization_status"]) == (FORMAT, "compressed")
    first, second = (config["config_groups"][f"group_{i}"] for i in range(2))
    assert config["ignore"] == [] and len(first["targets"]) + len(second["targets"]) == 2 * 7 + 1
    schemes = {"model.layers.1.self_attn.q_proj": ("group", 16, 4), "model.layers.0.mlp.up_proj": ("channel", None, 8)}
    for group, (name, expected) in zip((first, second), schemes.items(), strict=True):
        weights = group["weights"]
        assert name in group["targets"] and not weights["symmetric"]
        assert (weights["strategy"], weights["group_size"], weights["num_bits"]) == expected
        out, channels = stored[f"{name}.weight_shape"].tolist()
        codes = unpack_words(stored[f"{name}.weight_packed"], weights["num_bits"], channels).float()
        zero = unpack_words(stored[f"{name}.weight_zero_point"], weights["num_bits"], out, 0).float()
        scale = stored[f"{name}.weight_scale"]
        assert (codes.shape, zero.shape) == ((out, channels), scale.shape)
        grouped = (codes.unflatten(-1, (scale.shape[-1], -1)) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)
        plain = tmp_path / "plain"
        if not plain.exists():
            fuseline.export(model, plain, ROTATED, check=False)
        rotated = tensors_of(plain)[f"{name}.weight"]
        assert torch.equal(
            grouped.flatten(-2), Scheme(f"int{expected[2]}", expected[1] or 0, symmetric=False).rounded(rotated, 1.0)
        )


REFUSED = {
    "an embedding": ("Llama", "quantize{weights=int8,only=*.embed_tokens}", "and is looked up by its rows"),
    "a transposed weight": ("GPT-2", "quantize{weights=int8}", "c_attn.weight' is quantized, and belongs to Conv1D"),
    "stacked experts": ("Mixtral, grouped_mm", "quantize{weights=int8,skip=*.gate}", "holds experts in one tensor"),
    "inputs alone": ("Llama", "quantize{activations=int8}", "is rounded, and its weight is not"),
    "keys alone": ("Llama", "raise,quantize{weights=int8,keys=int8}", "one scheme for keys and values"),
    "some caches": ("Llama", "raise,quantize{keys=int8,values=int8,skip=*.1.*}", "1 of 2 attentions are left"),
    "no quantization": ("Llama", "raise,rotate{r2}", "quantizes nothing"),
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, tmp_path: Path) -> None:
    name, pipeline, reason = REFUSED[case]
    with pytest.raises(UserError) as raised:
        fuseline.export(model_of(name), tmp_path / "out", pipeline, format=FORMAT)
    assert reason in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_refusal_names_the_weights_alone(tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        fuseline.export(model_of("Llama"), tmp_path / "out", REFUSED["keys alone"][1], format=FORMAT)
    assert raised.value.remedy == '-p "raise,quantize{weights=int8:sym}"' or "weights=int8" in (
        raised.value.remedy or ""
    )


@pytest.mark.slow
def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    model = build("LlamaConfig", tie_word_embeddings=True).eval()
    with pytest.raises(UserError, match="'lm_head.weight' is quantized, and is looked up by its rows"):
        fuseline.export(model, tmp_path / "out", "quantize{weights=int8,only=lm_head}", format=FORMAT)


@pytest.mark.slow
def test_half_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the model is in float16, and its scales are float32"):
        fuseline.export(model_of("Llama").half(), tmp_path / "out", "quantize{weights=int8}", format=FORMAT)


@pytest.mark.skipif(find_spec("compressed_tensors") is not None, reason="it is installed")
def test_without_the_package_the_check_says_so(tmp_path: Path) -> None:
    written = fuseline.export(model_of("Llama"), tmp_path / "out", "quantize{weights=int8}", format=FORMAT)
    assert written.error is None and "compressed-tensors, which is not installed" in (written.unchecked or "")
