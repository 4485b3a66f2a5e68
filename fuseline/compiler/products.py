"""What a product of codes can be made of: the graph properties that `fuse` and code generation share."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .formats import FORMATS
from .formats.midrise import MidRise
from .formats.pair_codes import PAIR_CODES
from .formats.words import Words
from .ops import decode, dequantize, encode
from .traits import arguments

LONGEST = 2**31 // 128**2 - 1
"""Channels whose int8 products an int32 holds."""


def activation(node: Node) -> tuple[Node, Node] | None:
    """(codes, scale) of values of the run that stand as int8 or e4m3 codes with one scale a token; None for others."""
    if node.target not in (dequantize.overload, decode.overload):
        return None
    given = arguments(node)
    codes, scale = given["codes"], given["scale"]
    if given["zero"] is not None or given.get("outer") is not None or given.get("packed"):
        return None
    if given.get("bits", 8) != 8 or codes.meta["val"].dtype not in (torch.int8, torch.float8_e4m3fn):
        return None
    shape, scales = codes.meta["val"].shape, scale.meta["val"].shape
    whole = len(scales) == len(shape) and scales[-1] == 1 and given["group"] == shape[-1]
    return (codes, scale) if whole and scale.meta["val"].is_floating_point() and len(shape) > 1 else None


def refuse_codes(weight: Node, dtype: torch.dtype) -> str | None:
    """Why a weight's codes are not multiplied with activations' codes of this type, or None.

    weight: what `linear` reads. Where there is a reason, activations are decoded and the product is that of floats.
    """
    given = _given(weight)
    if given is None:
        return "its weight is not of codes"
    form = FORMATS[given["format"]]
    if dtype == torch.float8_e4m3fn:
        return None if form.name == "e4m3" and given["group"] == given["channels"] else (
            f"e4m3 activations are multiplied with e4m3 weights of one scale a channel, and these are {form.name}"
        )  # fmt: skip
    if not form.affine and form.name not in ("ternary", "binary"):
        return f"int8 activations are multiplied with integers, and the weight is {form.name}"
    if form.element.bits == 8 and given["zero"] is not None:
        return "codes of 8 bits less a zero point do not fit int8: int8:sym does"
    if given["group"] != given["channels"] and given["group"] & -given["group"] < 32:
        return f"groups of {given['group']}: products of int8 take multiples of 32"
    if given["channels"] > LONGEST:
        return f"an int32 does not hold the sum over {given['channels']} channels"
    return refuse_words(weight)


def refuse_words(weight: Node) -> str | None:
    """Why a weight's codes cannot be laid out for the tensor-core kernels, or None."""
    given = _given(weight)
    if given is None:
        return "it is not a weight of codes"
    if given["codes"].meta["val"].dim() != 2 or given["scale"].meta["val"].dim() != 2:
        return "its codes are no matrix"
    if isinstance(FORMATS[given["format"]].element, MidRise):
        return f"{given['format']} lies half-way between whole numbers, which no kernel takes off a code yet"
    channels, group = given["channels"], given["group"]
    if group != channels and group % 16:
        return f"groups of {group}: kernels read multiples of 16 (g{max(16, round(group / 16) * 16)})"
    return None


def _given(weight: Node) -> dict[str, Any] | None:
    """Format, codes, scale, zero, outer, group, channels of a weight; None where it is none of codes."""
    if weight.op != "call_function" or weight.target not in (dequantize.overload, decode.overload):
        return None
    given = arguments(weight)
    if weight.target is decode.overload:
        if not given["packed"]:
            return None
    else:
        given |= {"format": f"int{given['bits']}", "outer": None}
    return given | {"channels": int(given["scale"].meta["val"].shape[-1]) * given["group"]}


def words_of(weight: Node, with_codes: bool) -> tuple[dict[str, Any], int] | None:
    """A weight's parts and the run of its words; None where `refuse_words` has a reason.

    with_codes: it is multiplied with activations' codes, which codes of 8 bits are as they are stored: run 0.
    """
    if refuse_words(weight) is not None:
        return None
    given = _given(weight)
    assert given is not None
    bits = FORMATS[given["format"]].element.bits
    if bits == 8 and with_codes:
        return given, 0
    words = Words.fitting(bits, given["channels"], given["group"])
    return None if words is None else (given, words.run)


def pair_words_of(node: Node) -> int | None:
    """The run of the words that pairs of codes (`decode_pairs`) can be laid out in; None where there is none."""
    given = arguments(node)
    group = given["n"] // int(given["scale"].meta["val"].shape[-1])
    words = Words.fitting(sum(PAIR_CODES[given["format"]].planes), given["n"], group)
    return None if words is None else words.run


def rows_of_codes(node: Node) -> tuple[Node, Node] | None:
    """(codes, scale) of a matrix of int8 codes with one scale a row and no zero points; None for others."""
    if node.target is not dequantize.overload:
        return None
    given = arguments(node)
    codes, scale = given["codes"], given["scale"]
    whole = given["bits"] == 8 and given["zero"] is None and codes.meta["val"].dtype == torch.int8
    return (codes, scale) if whole and codes.meta["val"].dim() == 2 and scale.meta["val"].shape[-1] == 1 else None


def refuse_rows(node: Node) -> str | None:
    """Why a kernel of rows cannot make or read such codes, or None; None for other nodes, too."""
    given = arguments(node) if node.target in (encode.overload, decode.overload) else None
    if given is None:
        return None
    if node.target is decode.overload:
        return "scales in float64" if given["scale"].meta["val"].dtype == torch.float64 else None
    if given["x"].meta["val"].dtype == torch.float64:
        return "codes of float64 values"
    if not given["group"]:
        return "one scale for all rows, which takes all of them before the first code"
    if isinstance(FORMATS[given["format"]].element, MidRise):
        return f"codes of {given['format']}, which only weights have"
    if FORMATS[given["format"]].scaling == "e4m3":
        return (
            f"{given['format']} scales groups within a token's own scale, which takes the token before the first code"
        )
    return None
