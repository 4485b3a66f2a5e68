"""fuseline::decode_words: what codes stand for, in the layout that the tensor-core kernels read.

Code generation puts it in the place of `fuseline::dequantize` and `fuseline::decode` (codegen/repack.py).
"""

from __future__ import annotations

import torch

from ..formats import FORMATS
from ..formats.words import Words, as_stored
from ._define import Kind, op
from .decode import decode


@op(
    "decode_words(Tensor codes, Tensor scale, Tensor? zero, Tensor? outer, str format, int group, int run, "
    "ScalarType dtype) -> Tensor",
    kind=Kind.OTHER,
)
def decode_words(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    outer: torch.Tensor | None,
    format: str,
    group: int,
    run: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(number of the code − zero)·scale → [rows, n] in `dtype`, as `fuseline::decode`.

    codes: int32 in runs of `run`, of the shape that `Words` says (`formats/words.py`); or run 0 and one code in each
    element, [rows, n]. scale [n / group, rows] and zero of its shape lie across: a kernel's neighbouring rows read
    neighbouring scales. E4M3 scales may be given as their bytes, too.
    """
    form = FORMATS[format]
    n, rows = scale.shape[0] * group, scale.shape[1]
    element = form.of(zero is None)
    plain = as_stored(Words(element.bits, run).unpack(codes, rows, n), element.stored) if run else codes
    if form.scaling == "e4m3" and scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e4m3fn)
    across = None if zero is None else zero.t()
    return decode.naive(plain, scale.t(), across, outer, format, group, False, dtype)  # type: ignore[no-any-return]


@decode_words.fake
def _(codes, scale, zero, outer, format, group, run, dtype):
    return codes.new_empty((scale.shape[1], scale.shape[0] * group), dtype=dtype)


decode_words.lowers_to("codegen/templates/coded/kernel.py")
