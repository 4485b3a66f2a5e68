"""Floating-point codes of compressed-tensors: written by the package's own code, and exported by Fuseline."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import fuseline
from fuseline.compiler.precision import error
from fuseline.models import load
from fuseline.models.coded import CodedLinear

pytest.importorskip("transformers")

import transformers

from tests.exporting.plain import IDS, config_of, logits, model_of, tensors_of

needs_package = pytest.mark.skipif(
    find_spec("compressed_tensors") is None,
    reason="compressed-tensors is not installed: pip install compressed-tensors",
)
slow = pytest.mark.slow


def model_in(dtype: torch.dtype, folder: Path) -> torch.nn.Module:
    model_of("Llama").save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def calibrated(model: torch.nn.Module, scheme: Any) -> None:
    """Scales as the package computes them: of weights, and of what the inputs were on `IDS`."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0]))
    logits(model)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            whole = None
            weight, args = module.weight.detach().float(), scheme.weights
            parts = weight.reshape(1, 1, -1) if args.strategy == "tensor" else weight.unsqueeze(1)
            if args.group_size:
                parts = weight.unflatten(-1, (-1, args.group_size))
            if args.strategy == "block":
                rows, columns = args.block_structure
                parts = weight.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns)).transpose(1, 2).flatten(-2)
            if args.strategy == "tensor_group":
                whole = generate_gparam(weight.amin(), weight.amax())
                module.weight_global_scale.data.copy_(whole)
            scale, _ = calculate_qparams(parts.amin(-1), parts.amax(-1), args, global_scale=whole)
            module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
            if scheme.input_activations is not None and not scheme.input_activations.dynamic:
                x = inputs[name]
                module.input_scale.data.copy_(calculate_qparams(x.min(), x.max(), scheme.input_activations)[0])
            module.quantization_status = QuantizationStatus.FROZEN


#: The package's name of a scheme, the format, the model's dtype, and what its weights are in.
PRESETS = {
    "FP8": ("float-quantized", torch.float32, "e4m3"),
    "FP8_DYNAMIC": ("float-quantized", torch.float32, "e4m3"),
    "FP8_BLOCK": ("float-quantized", torch.float32, "e4m3"),
    "NVFP4A16": ("nvfp4-pack-quantized", torch.bfloat16, "nvfp4"),
    "MXFP4A16": ("mxfp4-pack-quantized", torch.bfloat16, "mxfp4"),
    "MXFP8A16": ("mxfp8-quantized", torch.bfloat16, "mxfp8"),
}


@needs_package
@pytest.mark.parametrize("preset", [pytest.param(p, marks=[] if p in ("FP8", "NVFP4A16") else slow) for p in PRESETS])
def test_what_compressed_tensors_wrote(preset: str, tmp_path: Path) -> None:
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    name, dtype, number = PRESETS[preset]
    model = model_in(dtype, tmp_path / "plain")
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if preset == "FP8_BLOCK":
        scheme.weights.block_structure, scheme.input_activations.group_size = [16, 32], 32
    calibrated(model, scheme)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "out")
    compressor.update_config(tmp_path / "out")
    assert config_of(tmp_path / "out")["quantization_config"]["format"] == name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ours = load(f"hf:{tmp_path / 'out'}").model
    expected = logits(theirs)
    linears = {path: m for path, m in ours.named_modules() if isinstance(m, CodedLinear)}
    assert len(linears) == 14 and {m.scheme.format for m in linears.values()} == {number}
    for path, module in linears.items():
        assert torch.equal(module.weight, theirs.get_submodule(path).weight)
    assert error(logits(ours), expected) < (1e-6 if dtype == torch.float32 else 1e-3)


#: Pipelines, the model's dtype, the format, and the strategy of the weights.
EXPORTS = {
    "quantize{weights=fp8}": (torch.float32, "float-quantized", "channel"),
    "quantize{weights=fp8:tensor,activations=fp8:tensor}": (torch.float32, "float-quantized", "tensor"),
    "quantize{weights=fp8,activations=fp8}": (torch.float32, "float-quantized", "channel"),
    "quantize{weights=fp8:b16}": (torch.bfloat16, "float-quantized", "block"),
    "quantize{weights=int2:g16}": (torch.float32, "pack-quantized", "group"),
    "quantize{weights=int3:g16}": (torch.bfloat16, "int-quantized", "group"),
    "quantize{weights=mxfp4}": (torch.bfloat16, "mxfp4-pack-quantized", "group"),
    "quantize{weights=nvfp4}": (torch.bfloat16, "nvfp4-pack-quantized", "tensor_group"),
    "quantize{weights=mxfp8}": (torch.bfloat16, "mxfp8-quantized", "group"),
}


@needs_package
@pytest.mark.one_in(9)
@pytest.mark.parametrize("pipeline", EXPORTS)
def test_what_fuseline_wrote(pipeline: str, tmp_path: Path) -> None:
    """transformers reads it, and Fuseline again; loaded, it is written once more with the same tensors."""
    dtype, name, strategy = EXPORTS[pipeline]
    model = model_in(dtype, tmp_path / "plain")
    written = fuseline.export(model, tmp_path / "out", pipeline, format="compressed-tensors")
    assert written.unchecked is None and written.error is not None and written.error < 1e-6
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["format"] == name and config["config_groups"]["group_0"]["weights"]["strategy"] == strategy
    ours = logits(fuseline.optimize(model, pipeline))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    again = load(f"hf:{tmp_path / 'out'}").model
    assert error(logits(theirs), ours) < 1e-6
    assert error(logits(again), ours) < 1e-6
    fuseline.export(again, tmp_path / "once more", format="compressed-tensors")
    before, after = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "once more")
    assert before.keys() == after.keys()
    for key, tensor in before.items():  # nvfp4's global scale is the inverse of an inverse
        assert torch.equal(tensor, after[key]) or "global" in key and error(after[key], tensor) < 1e-6
    assert config == config_of(tmp_path / "once more")["quantization_config"]


@pytest.mark.slow
def test_without_a_format(tmp_path: Path) -> None:
    model = model_of("Llama")
    for pipeline, reason in {
        "quantize{weights=fp6}": "for which compressed-tensors has no format",
        "quantize{weights=int4:g16,activations=fp8}": "beside inputs in e4m3, for which",
        "quantize{weights=mxfp4}": "has codes of mxfp4, and the model is in float32",
        "quantize{weights=int8,keys=fp8,values=fp8}": "kv_cache_scheme is written for integers",
    }.items():
        with pytest.raises(fuseline.UserError) as raised:
            fuseline.export(model, tmp_path / "out", pipeline, format="compressed-tensors")
        assert reason in str(raised.value)
        assert not (tmp_path / "out").exists()


def test_e2m1_by_hand(tmp_path: Path) -> None:
    """MXFP4 without the package: the sixteen numbers of e2m1, two a byte, times powers of two."""
    model = model_in(torch.bfloat16, tmp_path)
    name, table = "model.layers.0.mlp.up_proj", (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    out, channels = model.get_submodule(name).weight.shape
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (out, channels), generator=generator)
    exponents = torch.randint(118, 124, (out, channels // 32), generator=generator)
    numbers = torch.tensor([*table, *(-t for t in table)])[codes]
    weight = numbers * torch.exp2(exponents.float() - 127).repeat_interleave(32, 1)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state[f"{name}.weight"] = weight.to(torch.bfloat16)
    model.load_state_dict(state)
    del state[f"{name}.weight"]
    state[f"{name}.weight_packed"] = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    state[f"{name}.weight_scale"] = exponents.to(torch.uint8)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    args = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": [name], "weights": args, "format": "mxfp4-pack-quantized"}
    config = config_of(tmp_path) | {
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(f"hf:{tmp_path}").model
    assert torch.equal(loaded.get_submodule(name).weight, weight.to(torch.bfloat16))
    assert torch.equal(logits(loaded), logits(model)) and IDS.shape[0] == 2
