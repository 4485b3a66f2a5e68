"""fuseline::encode: values of the run as codes of any number format, without a zero point."""

from __future__ import annotations

import torch

from ..formats import FORMATS
from ._define import Kind, op


@op("encode(Tensor x, str format, int group) -> (Tensor, Tensor)", kind=Kind.ROW)
def encode(x: torch.Tensor, format: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x: [..., n] → codes [..., n], one in each element; scale [..., n / group] in float32 at least.

    format: a name of `formats.FORMATS`; group divides n (group = n: one scale a token), 0: one scale for all of x,
    shape [1, …, 1]. Scales are numbers that the format can store, nvfp4's times the token's own float32 scale.
    A NaN or an infinity makes its group's scale NaN (of nvfp4: its token's). Codes are int8 for int8, torch's own type
    for e4m3 and e5m2, and uint8 for others.
    """
    form = FORMATS[format]
    compute = torch.promote_types(x.dtype, torch.float32)
    values, element = x.to(compute), form.element
    groups = values.unflatten(-1, (-1, group)) if group else values.reshape(1, -1)
    token = lambda: values.abs().amax(-1, keepdim=True).unsqueeze(-1) if group else values.abs().amax()
    scale, _ = element.fit(groups, 1.0, form.scales(token, compute))
    codes = element.codes(element.nearest(groups / scale)).reshape(x.shape)
    return codes, scale.squeeze(-1) if group else scale.reshape([1] * x.dim())


@encode.fake
def _(x, format, group):
    compute = torch.promote_types(x.dtype, torch.float32)
    shape = (*x.shape[:-1], x.shape[-1] // group) if group else [1] * x.dim()
    return x.new_empty(x.shape, dtype=FORMATS[format].element.stored), x.new_empty(shape, dtype=compute)


encode.lowers_to("codegen/encode_rows.py")
