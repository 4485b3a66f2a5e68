"""Codes of a quantization: round(x / scale), half to even, as exact as a division and a third of its instructions.

    inverse = 1 / scale                          once a scale
    q       = x · inverse                        within one unit in the last place of x / scale
    ratio   = q + (x − q · scale) · inverse      rounded to nearest (Markstein, 1990), with two fused multiply-adds
    code    = low bits of ratio + 1.5·2^23       the sum's last bit is 1: the addition rounds, half to even

A scale under 2^-64, whose inverse might be infinite, is taken with its x times 2^64: nothing else changes. One under
2^-140, far below the normal numbers and so inexact that x / scale may pass the codes' limits, gives the code 0.
"""

from __future__ import annotations

import torch

from .dtypes import literal
from .formulas import divide
from .tile import Tile
from .values import Term

_SMALL, _LEAST = 2.0**-64, 2.0**-140
#: dtype → (bits of the mantissa, the integer of its size)
_FORMATS = {torch.float32: (23, "tl.int32"), torch.float64: (52, "tl.int64")}


def code(tile: Tile, name: str, x: Term, scale: Term, compute: torch.dtype) -> Term:
    """round(x / scale) as an integer of the size of `compute`, where |x| is at most 2^21 times `scale`.

    x, scale: terms of the type `compute`, float32 or float64; scale > 0, one for many x.
    """
    mantissa, integer = _FORMATS[compute]
    lift = f"tl.where({scale.text} < {literal(_SMALL, compute)}, {literal(1 / _SMALL, compute)}, {literal(1, compute)})"
    lift = tile.bind(f"{name}_lift", lift, scale.axes).text
    lifted = tile.bind(f"{name}_lifted", f"{scale.text} * {lift}", scale.axes).text
    least = literal(_LEAST / _SMALL, compute)
    inverse = f"tl.where({lifted} < {least}, {literal(0, compute)}, {divide(literal(1, compute), lifted, compute)})"
    inverse = tile.bind(f"{name}_inverse", inverse, scale.axes).text
    axes = x.axes | scale.axes
    value = tile.bind(f"{name}_value", f"{x.text} * {lift}", axes).text
    first = tile.bind(f"{name}_quotient", f"{value} * {inverse}", axes).text
    rest = tile.bind(f"{name}_rest", f"tl.fma(-{first}, {lifted}, {value})", axes).text
    ratio = tile.bind(f"{name}_ratio", f"tl.fma({rest}, {inverse}, {first})", axes).text
    shift = 1.5 * 2.0**mantissa
    bits = f"({ratio} + {literal(shift, compute)}).to({integer}, bitcast=True)"
    base = int(torch.tensor(shift, dtype=compute).view(torch.int32 if mantissa == 23 else torch.int64))
    offset = str(base) if mantissa == 23 else f"tl.full((), {base}, tl.int64)"
    return tile.bind(f"{name}_code", f"{bits} - {offset}", axes)
