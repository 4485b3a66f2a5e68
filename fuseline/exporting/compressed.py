"""Schemes and codes in the terms of compressed-tensors: what one weight is written as, and how that is described.

    format                  weights                         codes                              scales
    pack-quantized          integers of 1, 2, 4, 8 bits     `weight_packed`, int32 words       [out, in / group]
    int-quantized           others, and beside rounded      `weight`, int8                     [out, in / group]
                            inputs
    float-quantized         e4m3                            `weight`, e4m3                     [out, in / group], [1] of
                                                                                               a tensor, [out / r, …]
    mxfp8-quantized         mxfp8                           `weight`, e4m3                     uint8 exponents
    mxfp4-pack-quantized    mxfp4                           `weight_packed`, two a byte        uint8 exponents
    nvfp4-pack-quantized    nvfp4                           `weight_packed`, two a byte        e4m3, divided by
                                                                                               `weight_global_scale`

Real scales are in the model's dtype. Codes and zero points of integers are stored less 2^(b−1), signed; zero points
are int8, or packed down the rows. These are the formats that compressed-tensors itself chooses for such weights, but
for integers of 3, 5, 6 and 7 bits, which its releases pack in several ways. Checked with compressed-tensors 0.20.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compiler.schemes import Scheme
from ..models.packing import WIDTHS, pack_words

Tensors = dict[str, torch.Tensor]

DTYPES = (torch.float32, torch.bfloat16)
"""Of models whose scales are of the model's own dtype, as compressed-tensors multiplies with them."""

FLOATS = {
    "e4m3": "float-quantized",
    "mxfp8": "mxfp8-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
}


def format_of(weights: Scheme, activations: Scheme | None) -> str | None:
    """The name of the format that a linear is written in; None where there is none.

    Integers go with rounding to integers, and e4m3 with rounding to e4m3.
    """
    if weights.of.affine:
        if activations is not None and not activations.of.affine:
            return None
        return "pack-quantized" if activations is None and weights.bits in WIDTHS else "int-quantized"
    if activations is not None and {weights.format, activations.format} != {"e4m3"}:
        return None
    return FLOATS.get(weights.format)


def arguments(scheme: Scheme, channels: int | None = None) -> dict[str, Any]:
    """A scheme of weights as `QuantizationArgs`; channels: of a value that is rounded at run time, as groups."""
    group = scheme.group or channels
    made = {
        "num_bits": scheme.bits,
        "type": "int" if scheme.of.affine else "float",
        "symmetric": scheme.symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": channels is not None,
    }
    if scheme.rows == 0:
        return made | {"strategy": "tensor"}
    if scheme.rows > 1:
        return made | {"strategy": "block", "group_size": None, "block_structure": [scheme.rows, scheme.group]}
    if scheme.of.scaling != "real":
        stored = "torch.uint8" if scheme.of.scaling == "e8m0" else "torch.float8_e4m3fn"
        made |= {"scale_dtype": stored, "zp_dtype": stored}
    return made | ({"strategy": "tensor_group"} if scheme.of.scaling == "e4m3" else {})


def input_arguments(scheme: Scheme) -> dict[str, Any]:
    """The scheme of a linear's input as `QuantizationArgs`: one scale a token has a strategy of its own."""
    made = arguments(scheme) | {"dynamic": not scheme.static}
    return made if scheme.group or scheme.rows == 0 else made | {"strategy": "token"}


def tensors(format: str, scheme: Scheme, parts: Tensors, shape: torch.Size) -> Tensors:
    """The tensors of a linear's weight, by their names in its module.

    parts: codes [out, in], scale and, where the scheme has them, zero and outer, as `Scheme.quantize` makes them.
    """
    if scheme.of.affine:
        signed = {name: _signed(part, scheme) for name, part in parts.items() if name != "scale"}
        return {**FORMATS[format](signed, scheme.bits, shape), "weight_scale": parts["scale"]}
    made = {"weight": parts["codes"]}
    if format.endswith("pack-quantized"):
        made = {"weight_packed": parts["codes"][:, ::2] | parts["codes"][:, 1::2] << 4}
    if "outer" in parts:
        made["weight_global_scale"] = (1 / parts["outer"]).reshape(1)
    scale = parts["scale"]
    if scheme.rows != 1:  # it is repeated for each of the rows
        scale = scale[:: scheme.rows or len(scale)]
    return made | {"weight_scale": scale.reshape(1) if scheme.rows == 0 else scale}


def _signed(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return codes if codes.dtype == torch.int8 else (codes.to(torch.int16) - (1 << (scheme.bits - 1))).to(torch.int8)


def _packed(signed: Tensors, bits: int, shape: torch.Size) -> Tensors:
    made = {"weight_packed": pack_words(signed["codes"], bits), "weight_shape": torch.tensor(shape)}
    return made | ({"weight_zero_point": pack_words(signed["zero"], bits, 0)} if "zero" in signed else {})


def _plain(signed: Tensors, bits: int, shape: torch.Size) -> Tensors:
    return {"weight": signed["codes"]} | ({"weight_zero_point": signed["zero"]} if "zero" in signed else {})


FORMATS: dict[str, Callable[[Tensors, int, torch.Size], Tensors]] = {
    "pack-quantized": _packed,
    "int-quantized": _plain,
}
"""Of integers."""
