"""fuseline::decode_pair_words: the experts that pairs of codes stand for, in the layout that the kernels read.

Code generation puts it in the place of `fuseline::decode_pairs` (codegen/repack.py).
"""

from __future__ import annotations

import torch

from ..formats.pair_codes import PAIR_CODES
from ..formats.words import Words
from ._define import Kind, op


@op(
    "decode_pair_words(Tensor codes, Tensor scale, Tensor rows, Tensor slots, str format, int group, int run, "
    "ScalarType dtype) -> Tensor",
    kind=Kind.OTHER,
)
def decode_pair_words(
    codes: torch.Tensor,
    scale: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    format: str,
    group: int,
    run: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """codes: int32 in runs of `run`, of the R·m rows of all pairs (`formats/words.py`); scale: [R, n / group, m], which
    lies across: a kernel's neighbouring rows read neighbouring scales. The rest and the result are `decode_pairs`'."""
    form, (count, groups, height) = PAIR_CODES[format], scale.shape
    n = groups * group
    whole = Words(sum(form.planes), run).unpack(codes, count * height, n).to(torch.int16)
    return form.experts(whole.view(count, height, n), scale.transpose(1, 2), rows, slots, dtype)


@decode_pair_words.fake
def _(codes, scale, rows, slots, format, group, run, dtype):
    return codes.new_empty((rows.shape[0], scale.shape[2], scale.shape[1] * group), dtype=dtype)


decode_pair_words.lowers_to("codegen/templates/moe.py")
