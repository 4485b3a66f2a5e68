"""Runs `linear_cross_entropy` some rows at a time: one buffer of logits, which becomes their gradient in place.

A chunk is a product (cuBLAS), a pass over its rows (the kernel of `linear_cross_entropy_kernels.py` for CUDA tensors of
at most 32 bits, PyTorch elsewhere), and a product for each gradient that is wanted. Gradients are summed over the
chunks in float32 where the weights are of 16 bits, that of the logits is stored larger in float16 (`enlarged`). Nothing
waits for the GPU: the number of rows that count stays on it. Importing this file registers it, and imports Triton only
when a kernel is launched.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from ..compiler.ops import linear_cross_entropy, linear_cross_entropy_gradients
from ..compiler.ops._define import LIBRARY
from ..compiler.ops.linear_cross_entropy import accumulates_in, capped, check, enlarged, reduced, rows

LOGITS = 1 << 29
"""Bytes of logits at a time: 2048 rows of 128K tokens in bfloat16, enough for products to run at their full rate."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)
Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def loss(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor,
    class_weight: torch.Tensor | None, *settings: Any,
) -> torch.Tensor:  # fmt: skip
    """`linear_cross_entropy` without gradients."""
    return both(x, weight, bias, target, class_weight, None, False, False, False, *settings)[0]


def both(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor,
    class_weight: torch.Tensor | None, upstream: torch.Tensor | None, of_x: bool, of_weight: bool, of_bias: bool,
    reduction: int = 1, ignore_index: int = -100, label_smoothing: float = 0.0, scale: float = 1.0,
    softcap: float = 0.0, dtype: torch.dtype | None = None, chunk: int = 0,
) -> Results:  # fmt: skip
    """`linear_cross_entropy_gradients`."""
    check(class_weight, label_smoothing)
    (count, hidden), vocabulary = x.shape, weight.shape[0]
    made, wide = dtype or x.dtype, accumulates_in(x.dtype)
    valid = target != ignore_index
    known = target.masked_fill(~valid, 0)
    torch._assert_async(
        ((known >= 0) & (known < vocabulary)).all(), f"a target is neither in 0 … {vocabulary - 1} nor {ignore_index}"
    )
    weights = valid.to(accumulates_in(made))
    weights = weights if class_weight is None else weights * class_weight.to(weights.dtype)[known]
    factors = reduced(weights, weights, reduction, upstream)[1]  # the losses are not needed for them
    wants = of_x or of_weight or of_bias
    larger = enlarged(factors, scale, x.dtype) if wants else None
    factors = factors if larger is None else factors * larger

    losses = torch.empty_like(weights)
    dx = x.new_empty((count, hidden) if of_x else 0, dtype=wide)
    dw = weight.new_zeros((vocabulary, hidden) if of_weight else 0, dtype=wide)
    db = weight.new_zeros(vocabulary if of_bias else 0, dtype=wide)
    size = min(chunk or rows_at_a_time(vocabulary, x.element_size()), count)
    buffer = x.new_empty((size, vocabulary))
    for start in range(0, count, max(size, 1)):
        part = slice(start, min(start + size, count))
        piece, logits = x[part], buffer[: part.stop - start]
        if bias is None:
            torch.mm(piece, weight.t(), out=logits)
        else:
            torch.addmm(bias, piece, weight.t(), out=logits)
        _over_rows(
            logits, target[part], factors[part], losses[part], ignore_index, label_smoothing, scale, softcap, wants
        )
        if of_x:
            _product(logits, weight, dx[part])
        if of_weight:
            _add_product(dw, logits.t(), piece)
        if of_bias:
            db += logits.sum(0, dtype=wide)
    if larger is not None:
        for gradient in (dx, dw, db):
            gradient /= larger.to(wide)
    total = reduced(losses, weights, reduction)[0]
    return total.to(made), dx, dw, db


def rows_at_a_time(vocabulary: int, itemsize: int) -> int:
    """As many as make `LOGITS` bytes, in multiples of 128; at least 128."""
    return max(LOGITS // (vocabulary * itemsize) // 128 * 128, 128)


def _over_rows(
    logits: torch.Tensor, target: torch.Tensor, factors: torch.Tensor, losses: torch.Tensor, ignore: int,
    smoothing: float, scale: float, softcap: float, wants: bool,
) -> None:  # fmt: skip
    """Fills in the losses of some rows [n], and writes the rows' gradients over the logits [n, V] where wanted."""
    if logits.is_cuda and logits.dtype in TYPES and losses.dtype == torch.float32 and _kernels() is not None:
        launch(logits, target, factors, losses, ignore, smoothing, scale, softcap, wants)
        return
    values = capped(logits.to(losses.dtype), scale, softcap)
    found, gradient, _ = rows(values, target, None, ignore, smoothing)
    losses.copy_(found)
    if wants:
        gradient *= (factors * scale).unsqueeze(-1)
        logits.copy_(gradient * (1 - (values / softcap).square()) if softcap else gradient)


def launch(
    logits: torch.Tensor, target: torch.Tensor, factors: torch.Tensor, losses: torch.Tensor, ignore: int,
    smoothing: float, scale: float, softcap: float, wants: bool,
) -> None:  # fmt: skip
    """`_over_rows` by its kernel; logits: rows of any stride, columns side by side."""
    count, vocabulary = logits.shape
    block = min(8192, max(128, 1 << (vocabulary - 1).bit_length()))
    if not count:
        return
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _kernels().cross_entropy_rows[(count,)](
            logits, target, factors, losses, logits.stride(0), ignore, smoothing, scale, softcap or 1.0,
            VOCABULARY=vocabulary, CAPPED=bool(softcap), SMOOTHED=bool(smoothing), WANTS=wants, BLOCK=block,
            num_warps=16 if block > 2048 else 4,
        )  # fmt: skip


@cache
def _kernels() -> Any:
    """The kernels' module; None without Triton."""
    if find_spec("triton") is None:
        return None
    from . import linear_cross_entropy_kernels

    return linear_cross_entropy_kernels


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b, where out may be wider."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


@cache
def _adds_to_wider(device: torch.device) -> bool:
    """Whether PyTorch adds a product of 16-bit matrices to a float32 one in place, as cuBLAS can."""
    small, total = torch.ones(16, 16, device=device, dtype=torch.float16), torch.zeros(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, small, small, total.dtype, out=total)
    except RuntimeError:
        return False
    return True


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, where total may be wider."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and _adds_to_wider(a.device):
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    elif a.is_cuda:
        total += torch.ops.aten.mm.dtype(a, b, total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def flops(x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Of the products, from shapes."""
    wanted = [value for value in rest if isinstance(value, bool)]
    return int(2 * x[0] * x[1] * weight[0] * (1 + sum(wanted[:2])))


@cache
def count_flops() -> None:
    """Tells PyTorch the ops' FLOPs: with an activation budget its partitioner takes an op without them for free, and
    would compute the loss twice."""
    from torch.utils.flop_counter import register_flop_formula  # imports triton

    ops = torch.ops.fuseline
    register_flop_formula([ops.linear_cross_entropy, ops.linear_cross_entropy_gradients])(flops)


for _key in ("CPU", "CUDA"):
    LIBRARY.impl(linear_cross_entropy.name, loss, _key)
    LIBRARY.impl(linear_cross_entropy_gradients.name, both, _key)
