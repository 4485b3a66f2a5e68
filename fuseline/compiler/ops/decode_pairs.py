"""fuseline::decode_pairs: the experts that pairs of codes stand for (`formats/pair_codes.py`)."""

from __future__ import annotations

import torch

from ..formats.pair_codes import PAIR_CODES
from ._define import Kind, op


@op(
    "decode_pairs(Tensor codes, Tensor scale, Tensor rows, Tensor slots, str format, int n, ScalarType dtype) "
    "-> Tensor",
    kind=Kind.OTHER,
)
def decode_pairs(
    codes: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    format: str,
    n: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """codes: uint8 [R, m, bytes of n pairs]; scale: [R, m, n / group]; rows, slots: int32 [E], where each expert is, in
    slot 0 or 1 of a row. format: fp8 or int4. The result: [E, m, n] in dtype, magnitude · scale · sign in float32."""
    form = PAIR_CODES[format]
    return form.experts(form.whole(codes, n), scale, rows, slots, dtype)


@decode_pairs.fake
def _(codes, scale, rows, slots, format, n, dtype):
    return codes.new_empty((rows.shape[0], codes.shape[1], n), dtype=dtype)
