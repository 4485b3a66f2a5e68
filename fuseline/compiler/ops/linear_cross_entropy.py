"""fuseline::linear_cross_entropy: the cross-entropy of a linear layer's logits, which are never stored as a whole.

    logits = softcap·tanh(scale·(x @ weightᵀ + bias) / softcap)
    loss   = cross_entropy(logits, target)

What runs it takes some rows at a time (`runtime/linear_cross_entropy.py`). Where gradients are wanted, the same pass
over the rows computes them, so that a step costs the three matrix products that it costs with stored logits.

Source: the chunks and the gradient in the forward pass as in Liger Kernel (Hsu et al., 2024, "Liger Kernel: Efficient
Triton Kernels for LLM Training", section 3.2); the soft cap: Bello et al., 2016.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..errors import FuselineError
from ._define import op

NONE, MEAN, SUM = 0, 1, 2  # ATen's numbers of reductions
_SETTINGS = (
    "int reduction=1, int ignore_index=-100, float label_smoothing=0.0, float scale=1.0, float softcap=0.0, "
    "ScalarType? dtype=None, int chunk=0"
)


def accumulates_in(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and of gradients before they are rounded: float32 for 16-bit types, else the type."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def capped(logits: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    """softcap·tanh(scale·logits / softcap); scale·logits where there is no cap."""
    logits = logits * scale if scale != 1.0 else logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@op(
    f"linear_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, {_SETTINGS})"
    " -> Tensor",
    whole=True,
    records=True,
)
def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    chunk: int = 0,
) -> torch.Tensor:
    """x: [N, H], weight: [V, H], bias: [V] of one floating-point type; target: [N] int64; class_weight: [V].

    The loss has the type `dtype` (None: that of x), a scalar, or [N] with reduction 0 (none; 1 is the mean over what
    is not ignored, 2 the sum). Statistics are in `dtype`, in float32 for 16-bit ones. chunk: rows at a time, 0 for as
    many as `runtime/linear_cross_entropy.py` finds right.

    A mean over nothing is NaN, its gradients zero, as in PyTorch. A target outside of 0 … V − 1 that is not
    `ignore_index` is an error. Second derivatives are an error. Label smoothing and class weights exclude each other.
    """
    check(class_weight, label_smoothing)
    dtype = dtype or x.dtype
    logits = capped(F.linear(x, weight, bias).to(accumulates_in(dtype)), scale, softcap)
    weights = class_weight if class_weight is None else class_weight.to(logits.dtype)
    words = ("none", "mean", "sum")
    loss = F.cross_entropy(
        logits, target, weights, ignore_index=ignore_index, reduction=words[reduction], label_smoothing=label_smoothing
    )
    return loss.to(dtype)


@linear_cross_entropy.fake
def _(x, weight, bias, target, class_weight, reduction=MEAN, ignore_index=-100, label_smoothing=0.0, scale=1.0,
      softcap=0.0, dtype=None, chunk=0):  # fmt: skip
    return x.new_empty(target.shape if reduction == NONE else (), dtype=dtype or x.dtype)


@op(
    "linear_cross_entropy_gradients(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    f"Tensor? upstream, bool of_x, bool of_weight, bool of_bias, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    whole=True,
)
def linear_cross_entropy_gradients(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    upstream: torch.Tensor | None,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
    reduction: int = MEAN,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float = 0.0,
    dtype: torch.dtype | None = None,
    chunk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`linear_cross_entropy`, and its gradients for x, weight and bias, each in float32 where its tensor is of 16 bits.

    A gradient that is not wanted is empty, [0]. upstream: [N], what multiplies each row's part with reduction 0.
    """
    check(class_weight, label_smoothing)
    made, wide = dtype or x.dtype, accumulates_in(x.dtype)
    raw = F.linear(x, weight, bias)
    logits = capped(raw.to(accumulates_in(made)), scale, softcap)
    losses, of_rows, factors = rows(logits, target, class_weight, ignore_index, label_smoothing)
    loss, factors = reduced(losses, factors, reduction, upstream)
    larger = enlarged(factors, scale, x.dtype)
    factors = factors if larger is None else factors * larger
    of_logits = of_rows * (factors * scale).unsqueeze(-1)
    of_logits = of_logits * (1 - (logits / softcap).square()) if softcap else of_logits
    of_logits = of_logits.to(x.dtype).to(wide)
    of_logits = of_logits if larger is None else of_logits / larger.to(wide)
    none = x.new_empty(0, dtype=wide)
    return (
        loss.to(made),
        of_logits @ weight.to(wide) if of_x else none,
        of_logits.t() @ x.to(wide) if of_weight else none.clone(),
        of_logits.sum(0) if of_bias else none.clone(),
    )


def enlarged(factors: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor | None:
    """What rows' factors are multiplied by while the gradient of the logits is of this type; None for nothing.

    A probability over the number of rows is soon below 6e-5, where float16 has a fixed step of 6e-8, and multiplying
    the loss (torch.amp.GradScaler) comes too late for a gradient that the forward pass stores. No element is larger
    than its row's factor: a power of two brings the largest factor to 2^13 … 2^14, an eighth of what float16 holds.
    """
    if dtype != torch.float16 or not factors.numel():
        return None
    return torch.exp2(14 - torch.frexp(factors.abs().amax() * abs(scale)).exponent.clamp(-100, 128).to(factors.dtype))


def rows(
    logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, ignore: int, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of logits [N, V]: each row's loss [N] and its gradient [N, V], both without the row's factor, and the factors
    [N]: its class's weight, 0 where it is ignored."""
    valid = target != ignore
    known = target.masked_fill(~valid, 0).unsqueeze(-1)
    total = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, known)
    losses = total - (1 - smoothing) * chosen
    losses = losses - smoothing * logits.mean(-1, keepdim=True) if smoothing else losses
    gradient = torch.exp(logits - total) - smoothing / logits.shape[-1]
    gradient.scatter_add_(-1, known, torch.full_like(chosen, smoothing - 1))
    factors = valid.to(logits.dtype)
    if class_weight is not None:
        factors = factors * class_weight.to(logits.dtype)[known.squeeze(-1)]
    return losses.squeeze(-1), gradient, factors


def reduced(
    losses: torch.Tensor, factors: torch.Tensor, reduction: int, upstream: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and what multiplies the gradient of each row, from each row's loss and factor (0: ignored)."""
    ignored = factors == 0
    weighted = (losses * factors).masked_fill(ignored, 0)
    if reduction == NONE:
        return weighted, factors if upstream is None else factors * upstream.to(factors.dtype)
    if reduction == SUM:
        return weighted.sum(), factors
    total = factors.sum()
    return weighted.sum() / total, (factors / total).masked_fill(ignored, 0)


@linear_cross_entropy_gradients.fake
def _(x, weight, bias, target, class_weight, upstream, of_x, of_weight, of_bias, reduction=MEAN, ignore_index=-100,
      label_smoothing=0.0, scale=1.0, softcap=0.0, dtype=None, chunk=0):  # fmt: skip
    shapes = (x.shape if of_x else (0,), weight.shape if of_weight else (0,), weight.shape[:1] if of_bias else (0,))
    gradients = [x.new_empty(shape, dtype=accumulates_in(x.dtype)) for shape in shapes]
    return x.new_empty(target.shape if reduction == NONE else (), dtype=dtype or x.dtype), *gradients


@linear_cross_entropy_gradients.backward
def _(ctx, *grads):
    raise _no_second_derivatives()


def _no_second_derivatives() -> FuselineError:
    return FuselineError(
        "a fused loss has no second derivatives", remedy='options={"pipeline": "…"} without fuse-loss for this model'
    )


class _Recorded(torch.autograd.Function):
    """A reduced loss: gradients come with it, and are multiplied by what comes from above. Per row: they come later."""

    @staticmethod
    def forward(ctx, x, weight, bias, target, class_weight, *settings):
        ctx.settings, ctx.types = settings, [t if t is None else t.dtype for t in (x, weight, bias)]
        needs = ctx.needs_input_grad[:3]
        if settings[0] == NONE:
            ctx.save_for_backward(x, weight, bias, target, class_weight)
            return linear_cross_entropy(x, weight, bias, target, class_weight, *settings)
        loss, *gradients = linear_cross_entropy_gradients(
            x, weight, bias, target, class_weight, None, *needs, *settings
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph=True: the stored gradients know nothing of x and weight
            raise _no_second_derivatives()
        needs = ctx.needs_input_grad[:3]
        if ctx.settings[0] == NONE:
            x, weight, bias, target, class_weight = ctx.saved_tensors
            _, *gradients = linear_cross_entropy_gradients(
                x, weight, bias, target, class_weight, grad, *needs, *ctx.settings
            )
        else:
            gradients = [g * grad.to(g.dtype) if need else g for g, need in zip(ctx.saved_tensors, needs, strict=True)]
        results = [g.to(t) if n else None for g, t, n in zip(gradients, ctx.types, needs, strict=True)]
        return *results, None, None, *([None] * len(ctx.settings))


@linear_cross_entropy.autograd
def _(x, weight, bias, target, class_weight, reduction=MEAN, ignore_index=-100, label_smoothing=0.0, scale=1.0,
      softcap=0.0, dtype=None, chunk=0):  # fmt: skip
    settings: tuple[Any, ...] = (reduction, ignore_index, label_smoothing, scale, softcap, dtype, chunk)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _Recorded.apply(x, weight, bias, target, class_weight, *settings)
    with torch._C._AutoDispatchBelowAutograd():
        return linear_cross_entropy(x, weight, bias, target, class_weight, *settings)


def check(class_weight: torch.Tensor | None, label_smoothing: float) -> None:
    if class_weight is not None and label_smoothing:
        raise FuselineError("linear_cross_entropy takes label smoothing or class weights, not both")
