"""Checkpoints of compressed-tensors in Fuseline: codes are used as they are, and the logits are transformers'."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

import fuseline
from fuseline.compiler.expressions import Param
from fuseline.compiler.precision import error
from fuseline.models import compressed, load
from fuseline.models.coded import CodedLinear
from fuseline.models.compressed_linear import CompressedLinear, Layout
from fuseline.models.packing import pack_words, unpack_words

pytest.importorskip("transformers")

import transformers

from tests.exporting.plain import IDS, logits, model_of, tensors_of

needs_package = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install compressed-tensors",
)


def written(folder: Path, pipeline: str) -> torch.nn.Module:
    """Exports a tiny Llama; the model."""
    model = model_of("Llama")
    fuseline.export(model, folder, pipeline, format="compressed-tensors", check=False)
    return model


MIXED = (
    "raise,rotate{r1,r2,untie},quantize{weights=int4:g16,only=*.mlp.*}"
    ",quantize{weights=int8:asym,activations=int8:g32,only=*.self_attn.*|lm_head}"
)


@pytest.mark.slow
def test_an_exported_checkpoint_comes_back(tmp_path: Path) -> None:
    ours = logits(fuseline.optimize(written(tmp_path / "out", MIXED), MIXED))
    model = load(f"hf:{tmp_path / 'out'}").model
    kinds = {name: (m.bits, m.codes.dtype) for name, m in model.named_modules() if isinstance(m, CodedLinear)}
    assert len(kinds) == 2 * 7 + 1
    assert kinds["model.layers.0.mlp.up_proj"] == (4, torch.uint8) and kinds["lm_head"] == (8, torch.uint8)
    assert error(logits(model), ours) < 1e-6
    captured = fuseline.capture(model, (IDS,), {"use_cache": False})
    (found, *_) = (n for n in captured.graph.nodes if n.target is fuseline.compiler.ops.dequantize.overload)
    (linear,) = found.users
    assert linear.target is torch.ops.aten.linear.default
    parts = {n.meta["weight"] for n in captured.weights()}
    assert Param("model.layers.0.mlp.up_proj.codes") in parts, "codes are weights, and are not computed"


@pytest.mark.slow
def test_loaded_codes_are_saved_again(tmp_path: Path) -> None:
    written(tmp_path / "out", MIXED)
    model = fuseline.optimize(load(f"hf:{tmp_path / 'out'}").model, "raise,fuse", keep_originals=False)
    ours = logits(model)
    fuseline.save(model, tmp_path / "saved")
    assert torch.equal(logits(fuseline.load(tmp_path / "saved")), ours)


@needs_package
@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("W4A16_ASYM", "pack-quantized"),
        ("W8A16", "pack-quantized"),
        ("W2A16", "pack-quantized"),
        ("W8A8", "int-quantized"),
    ],
)
def test_what_compressed_tensors_wrote(preset: str, name: str, tmp_path: Path) -> None:
    """Calibrated, compressed and saved by the package's own code, as llm-compressor has it do."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    model = model_of("Llama")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    group = 32 if scheme.weights.strategy == "group" else None
    scheme.weights.group_size = group
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*k_proj"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            rows = module.weight.detach().unflatten(-1, (-1, group or module.weight.shape[-1]))
            scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scale)
            module.weight_zero_point.data.copy_(zero)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["format"]) == ("compressed-tensors", name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = load(f"hf:{tmp_path}").model
    assert sum(isinstance(m, CodedLinear) for m in ours.modules()) == 2 * 6
    expected = logits(theirs)
    for path, module in ours.named_modules():
        if isinstance(module, CodedLinear):
            assert torch.equal(module.weight, theirs.get_submodule(path).weight)
    if name == "pack-quantized":  # without zero points, rounded inputs are divided by another range
        assert error(logits(ours), expected) < 1e-6


WRITTEN = Path(__file__).parent / "llm_compressor"


def test_what_llm_compressor_wrote() -> None:
    """Its checkpoint, read without it: codes, and logits of a plain Llama with the weights that they stand for."""
    stored, model = tensors_of(WRITTEN), load(f"hf:{WRITTEN}").model
    state = {name: tensor for name, tensor in stored.items() if ".weight_" not in name}
    linears = [name for name, module in model.named_modules() if isinstance(module, CodedLinear)]
    assert len(linears) == 7 and model.dtype == torch.bfloat16
    for name in linears:
        packed, scale, zero = (stored[f"{name}.weight_{part}"] for part in ("packed", "scale", "zero_point"))
        out, channels = stored[f"{name}.weight_shape"].tolist()
        codes = unpack_words(packed, 4, channels).float().unflatten(-1, (-1, 16))
        shift = unpack_words(zero, 4, out, 0).float().unsqueeze(-1)
        state[f"{name}.weight"] = ((codes - shift) * scale.float().unsqueeze(-1)).flatten(-2).to(torch.bfloat16)
        assert torch.equal(model.get_submodule(name).weight, state[f"{name}.weight"])
    config = transformers.AutoConfig.from_pretrained(WRITTEN)
    del config.quantization_config
    plain = transformers.LlamaForCausalLM(config).eval()
    plain.load_state_dict(state, assign=True)
    assert error(logits(model), logits(plain)) < 1e-3


@needs_package
def test_transformers_reads_what_llm_compressor_wrote_alike() -> None:
    theirs, ours = transformers.AutoModelForCausalLM.from_pretrained(WRITTEN).eval(), load(f"hf:{WRITTEN}").model
    expected = logits(theirs)
    assert error(logits(ours), expected) < 1e-3
    assert error(logits(fuseline.optimize(ours, "raise,fuse")), expected) < 2e-2


@needs_package
@given(
    st.lists(
        st.sampled_from(["Linear", "ReLU", "a", "b.a", "re:.*a$", "re:b", "re:.*\\.[01]"]), min_size=1, max_size=3
    ),
    st.lists(st.sampled_from(["a", "b.a", "re:.*0$", "ReLU"]), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_targets_are_matched_as_they_do(targets: list[str], ignore: list[str]) -> None:
    from compressed_tensors.utils.match import match_named_modules, match_targets

    inner = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": inner})
    layout = Layout(True, 4, 0, True)
    groups = [compressed.Group((target,), layout, None) for target in dict.fromkeys(targets)]
    found = compressed.find(model, groups, ignore)
    theirs = dict(match_named_modules(model, dict.fromkeys(targets), ignore))
    assert list(found) == list(theirs)
    for name, group in found.items():
        assert group.targets == (match_targets(name, theirs[name], targets)[0],)


@given(
    st.sampled_from(((1, True), (2, True), (4, True), (8, True), (8, False))),
    st.sampled_from((-1, 0, 3, 4)),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_every_layout(stored: tuple[int, bool], group: int, symmetric: bool) -> None:
    """Against (code − zero)·scale on the signed codes."""
    (bits, packed), (out, channels) = stored, (5, 12)
    module = CompressedLinear(nn.Linear(channels, out), Layout(packed, bits, group, symmetric), None)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scales = module.layout.scales(out, channels)
    codes = torch.randint(low, high + 1, (out, channels), dtype=torch.int8)
    zero = (
        torch.zeros(scales, dtype=torch.int8) if symmetric else torch.randint(low, high + 1, scales, dtype=torch.int8)
    )
    state: dict[str, Any] = {"weight_scale": torch.rand(scales)}
    if packed:
        state |= {"weight_packed": pack_words(codes, bits), "weight_shape": torch.tensor(codes.shape)}
    else:
        state["weight"] = codes
    if not symmetric:
        state["weight_zero_point"] = pack_words(zero, bits, 0) if packed and group >= 0 else zero
    bias = torch.randn(out)
    module.load_state_dict(state | {"bias": bias}, assign=True)
    wide = [t.expand(out, 1) if group < 0 else t for t in (state["weight_scale"], zero)]
    scale, shift = (t.repeat_interleave(channels // t.shape[-1], -1) for t in wide)
    expected, x = (codes.float() - shift.float()) * scale, torch.randn(3, channels)
    made = module.finished("w")
    assert torch.equal(made.weight, expected)
    assert torch.equal(made(x), nn.functional.linear(x, expected, bias))


def group(weights: dict[str, Any] | None = None, **rest: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True} | (weights or {})
    one = {"targets": ["Linear"], "weights": args, "format": "pack-quantized"} | rest
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": one}}


INPUTS = {"num_bits": 8, "type": "int", "strategy": "channel", "dynamic": False}
REFUSED = {
    "fp6": (group({"type": "float", "num_bits": 6}, format="float-quantized"), "format 'float-quantized' with float6"),
    "three bits": (group({"num_bits": 3}), "3-bit codes, which releases of compressed-tensors pack in several ways"),
    "blocks": (group({"strategy": "block"}), "a scale for each block"),
    "order": (group({"actorder": "group", "num_bits": 8}, format="int-quantized"), "orders channels by activation"),
    "static inputs": (group(input_activations=INPUTS), "rounds inputs to int8 at fixed scales, by channel"),
    "local": (group(input_activations=INPUTS | {"dynamic": "local"}), "rounds inputs to int8 at run time (local)"),
    "blocks of another size": (
        group({"type": "float", "group_size": 16}, format="mxfp4-pack-quantized"),
        "has mxfp4 in groups of 16, and its blocks are of 32",
    ),
    "cache": (group() | {"kv_cache_scheme": INPUTS}, "quantizes keys and values"),
    "rotations": (group() | {"transform_config": {"config_groups": {"R4": {}}}}, "rotations at run time"),
    "not compressed": (
        group() | {"quantization_status": "frozen"},
        "its weights are 'frozen', and no codes are stored",
    ),
    "sparse": (group() | {"sparsity_config": {"format": "sparse-bitmask"}}, "stored sparse"),
    "outputs": (group(output_activations=INPUTS), "rounds outputs"),
    "inputs alone": (group() | {"config_groups": {"group_0": {"targets": ["Linear"]}}}, "quantizes no weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    config, reason = REFUSED[case]
    with pytest.raises(fuseline.UserError) as raised:
        compressed.read(config)
    assert reason in str(raised.value)


def test_other_modules_and_widths_are_refused() -> None:
    with pytest.raises(fuseline.UserError, match="'0', which it quantizes, is a Embedding"):
        compressed.replace(nn.Sequential(nn.Embedding(4, 32)), group(targets=["Embedding"]))
    with pytest.raises(fuseline.UserError, match="groups of 32 do not divide the 48 inputs of '0'"):
        compressed.replace(nn.Sequential(nn.Linear(48, 4)), group())


def test_a_refused_checkpoint_is_an_error_of_load(tmp_path: Path) -> None:
    written(tmp_path / "out", "raise,quantize{weights=int8,keys=int8,values=int8}")
    with pytest.raises(fuseline.UserError, match="quantizes keys and values"):
        load(f"hf:{tmp_path / 'out'}")
