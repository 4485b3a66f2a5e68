"""Launches the kernels of fake quantization for CUDA tensors; everything else runs the ops' naive twins.

They are hand-written (`fake_quantize_kernels.py`), for training runs a graph in eager, where nothing is generated.
Importing this file registers them, and imports Triton only when one is launched.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from ..compiler.formats import FORMATS, Integer
from ..compiler.formats.learned import LEAST
from ..compiler.formats.midrise import MidRise
from ..compiler.formats.ternary import Binary
from ..compiler.ops import fake_quantize, fake_quantize_backward, round_through
from ..compiler.ops._define import LIBRARY
from ..compiler.ops.fake_quantize import rule_of
from ..compiler.schemes import Scheme

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _kernels() -> Any:
    """The kernels' module; None without Triton."""
    if find_spec("triton") is None:
        return None
    from . import fake_quantize_kernels

    return fake_quantize_kernels


def settings(x: torch.Tensor, group: int) -> dict[str, Any]:
    """Of a launch for groups of this many channels."""
    block = min(2048, max(32, 1 << (group - 1).bit_length()))
    return {"SHORT": x.dtype == torch.bfloat16, "GROUP": group, "BLOCK": block, "num_warps": 4 if block <= 1024 else 8}


def numbers_of(format: str) -> dict[str, Any]:
    """The kernels' constants for a format's numbers."""
    element = FORMATS[format].element
    least = float(element.ends[0]) if isinstance(element, Integer) else -element.top
    shift = 0.5 if isinstance(element, MidRise) else 0.0
    return {"SHIFT": shift, "LEAST": least, "MOST": float(element.top), "SIGNS": isinstance(element, Binary)}


def forward(x: torch.Tensor, range: torch.Tensor, format: str, group: int) -> torch.Tensor:
    """`fake_quantize` by its kernel."""
    if not _fits(x):
        return fake_quantize.naive(x, range, format, group)  # type: ignore[no-any-return]
    x, alpha = x.contiguous(), range.contiguous()
    made, rule = torch.empty_like(x), rule_of(format)
    if alpha.numel():
        with _on(x):
            _kernels().learned_forward[(alpha.numel(),)](
                x, alpha, made, LEAST, rule.unit, **numbers_of(format), **settings(x, group)
            )
    return made


def backward(
    grad: torch.Tensor, x: torch.Tensor, range: torch.Tensor, format: str, group: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`fake_quantize_backward` by its kernel."""
    if not _fits(x):
        return fake_quantize_backward.naive(grad, x, range, format, group)  # type: ignore[no-any-return]
    grad, x, alpha, rule = grad.contiguous(), x.contiguous(), range.contiguous(), rule_of(format)
    of_x, of_alpha = torch.empty_like(x), torch.empty_like(alpha)
    if alpha.numel():
        factor = 1 / math.sqrt(x.numel() * rule.top)
        with _on(x):
            _kernels().learned_backward[(alpha.numel(),)](
                grad, x, alpha, of_x, of_alpha, LEAST, rule.unit, rule.low, rule.high,
                rule.below, rule.above, factor,
                **numbers_of(format), FOLLOWS=rule.follows, **settings(x, group),
            )  # fmt: skip
    return of_x, of_alpha


def through(x: torch.Tensor, scheme: str, weights: bool) -> torch.Tensor:
    """`round_through` by its kernel, where the scheme is of symmetric integers with a range of their own a group."""
    chosen = Scheme.parse(scheme, weights=weights)
    element = chosen.element
    if not (_fits(x) and isinstance(element, Integer) and chosen.symmetric and chosen.rows == 1 and not chosen.mse):
        return round_through.naive(x, scheme, weights)  # type: ignore[no-any-return]
    x = x.contiguous()
    group = chosen.group_of(x.shape[-1])
    made = torch.empty_like(x)
    if x.numel():
        least = element.ends[0] if weights else -element.top  # values of the run leave the lowest code out
        with _on(x):
            _kernels().largest_forward[(x.numel() // group,)](
                x, made, float(element.top), float(least), float(element.top),
                **settings(x, group) | {"SHORT": weights and x.dtype == torch.bfloat16},
            )  # fmt: skip
    return made


def _fits(x: torch.Tensor) -> bool:
    return x.dtype in TYPES and _kernels() is not None


def _on(x: torch.Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


for _op, _launch in ((fake_quantize, forward), (fake_quantize_backward, backward), (round_through, through)):
    LIBRARY.impl(_op.name, _launch, "CUDA")
