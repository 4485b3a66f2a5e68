"""The same setting through torchao's `quantize_`, where it has one."""

from __future__ import annotations

from typing import Any

import torch

from fuseline.passes.calibrated import Method

from .settings import Setting


def config(setting: Setting) -> Any:
    """torchao's configuration of the setting; None where it has none."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        IntxWeightOnlyConfig,
        PerRow,
    )
    from torchao.quantization.granularity import PerAxis, PerGroup
    from torchao.quantization.quant_primitives import MappingType

    weights, activations = setting.weights, setting.activations
    known = setting.plain and setting.method in (Method.RTN, Method.HQQ)
    if not known or weights is None or weights.rows != 1 or weights.of.scaling != "real":
        return None
    by_token = activations is not None and not activations.static and activations.rows == 1 and not activations.group
    if weights.format == "e4m3" and not weights.group and not weights.mse:
        if activations is None:
            return Float8WeightOnlyConfig()
        able = by_token and torch.cuda.is_available()  # it refuses a CPU
        return Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if able else None
    if not weights.of.affine or (activations is not None and not (by_token and activations.format == "int8")):
        return None
    if activations is not None and weights.format == "int8" and weights.symmetric and not weights.group:
        return Int8DynamicActivationInt8WeightConfig()
    kinds = {True: MappingType.SYMMETRIC, False: MappingType.ASYMMETRIC}
    choices: dict[str, Any] = {
        "weight_dtype": getattr(torch, weights.format),
        ("weight_" if activations else "") + "granularity": PerGroup(weights.group) if weights.group else PerAxis(0),
        ("weight_" if activations else "") + "mapping_type": kinds[weights.symmetric],
    }
    if setting.method is Method.HQQ:
        choices["intx_choose_qparams_algorithm"] = "hqq_scale_only"
    if activations is None:
        return IntxWeightOnlyConfig(**choices)
    return Int8DynamicActivationIntxWeightConfig(**choices)  # its activations have a zero point, always


def quantized(model: torch.nn.Module, setting: Setting) -> torch.nn.Module:
    """The model itself, its linears rounded, the head left alone."""
    from torchao.quantization import quantize_

    head = model.get_output_embeddings()
    quantize_(model, config(setting), filter_fn=lambda m, _: isinstance(m, torch.nn.Linear) and m is not head)
    return model
