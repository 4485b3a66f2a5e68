"""Schemes and codes in the terms of compressed-tensors: what one weight is written as, and how that is described.

    format           weights                        codes                                 zero points
    int-quantized    beside rounded activations     `weight`, int8                        int8
    pack-quantized   alone                          `weight_packed`, int32 words          int32 words, down the rows

Both have `weight_scale` [out, in / group] in the model's dtype. Codes and zero points are stored less 2^(b−1), signed.
These are the formats that compressed-tensors itself chooses for such weights.
Checked with compressed-tensors 0.20.1. A further number format is a row of `FORMATS` and a case of `format_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..compiler.schemes import Scheme
from ..models.packing import pack_words

Tensors = dict[str, torch.Tensor]

DTYPES = (torch.float32, torch.bfloat16)
"""Of models whose scales are of the model's own dtype, as compressed-tensors multiplies with them."""


def format_of(weights: Scheme, activations: Scheme | None) -> str:
    """The name of the format that a linear is written in."""
    return "pack-quantized" if activations is None else "int-quantized"


def arguments(scheme: Scheme, channels: int | None = None) -> dict[str, Any]:
    """A scheme of weights as `QuantizationArgs`; channels: of a value that is rounded at run time, as groups."""
    group = scheme.group or channels
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
        "dynamic": channels is not None,
    }


def input_arguments(scheme: Scheme) -> dict[str, Any]:
    """The scheme of a linear's input as `QuantizationArgs`: one scale a token has a strategy of its own."""
    made = arguments(scheme) | {"dynamic": True}
    return made if scheme.group else made | {"strategy": "token"}


def tensors(format: str, scheme: Scheme, parts: Tensors, shape: torch.Size) -> Tensors:
    """The tensors of a linear's weight, by their names in its module.

    parts: codes [out, in], scale and, when asymmetric, zero, as `Scheme.quantize` makes them.
    """
    signed = {name: _signed(part, scheme) for name, part in parts.items() if name != "scale"}
    return {**FORMATS[format](signed, scheme.bits, shape), "weight_scale": parts["scale"]}


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
