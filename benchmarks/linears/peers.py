"""The same linears in torchao and gemlite, where these are installed: kind → a layer for a bfloat16 weight."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F

Layer = Callable[[torch.Tensor], torch.Tensor]


def torchao_layer(kind: str, weight: torch.Tensor) -> Layer | None:
    """torchao's layer, compiled; None where it has no such kernel."""
    if importlib.util.find_spec("torchao") is None:
        return None
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    configs = {
        "w4a16": lambda: Int4WeightOnlyConfig(group_size=128, int4_packing_format="tile_packed_to_4d"),
        "w8a16": Int8WeightOnlyConfig,
        "w8a8": Int8DynamicActivationInt8WeightConfig,
        "fp8": lambda: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()),
    }
    if kind not in configs:
        return None
    layer = _linear(weight)
    quantize_(layer, configs[kind]())
    return lambda x: _product(x, layer.weight)


def gemlite_layer(kind: str, weight: torch.Tensor) -> Layer | None:
    """gemlite's layer with the configurations that it has for an H100; None where it has no such kernel."""
    if importlib.util.find_spec("gemlite") is None:
        return None
    helper = _gemlite()
    device, dtype = str(weight.device), weight.dtype
    n, k = weight.shape
    bits = {"w4a16": 4, "w2a16": 2, "w4a8": 4}.get(kind)
    if kind == "w8a16":
        return helper.A16W8_INT8(device=device, dtype=dtype).from_weights(weight)
    if kind == "w8a8":
        return helper.A8W8_int8_dynamic(device=device, dtype=dtype).from_weights(weight)
    if kind == "fp8":
        return helper.A8W8_fp8_dynamic(device=device, dtype=dtype).from_weights(weight)
    if bits is None:
        return None
    groups = weight.reshape(-1, 128).float()
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-6)
    zero = -low / scale
    codes = (groups / scale + zero).round().clamp(0, 2**bits - 1).to(torch.uint8).view(n, k)
    made = {"w4a16": helper.A16W4_HQQ_INT, "w2a16": helper.A16W2_HQQ_INT, "w4a8": helper.A8W4_HQQ_INT_dynamic}[kind]
    return made(device=device, dtype=dtype).from_weights(codes, scale.to(dtype).view(n, -1), zero.to(dtype).view(n, -1))


@partial(torch.compile, dynamic=False)
def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One function for all copies of a layer: their weights are its arguments, so it is compiled once a shape."""
    return F.linear(x, weight)


@cache
def _gemlite():  # type: ignore[no-untyped-def]
    import gemlite
    from gemlite import helper

    config = Path(gemlite.__file__).parent / "configs" / "h100.json"
    if config.exists():
        gemlite.GemLiteLinear.load_config(str(config))
    return helper


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    n, k = weight.shape
    layer = torch.nn.Linear(k, n, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer
