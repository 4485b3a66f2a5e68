"""fuseline::moe: the routed experts of a mixture-of-experts layer, each a gated feed-forward network.

    out[t] = Σ_k weights[t, k] · (down[e]·glu(gate_up[e]·hidden[t] + gate_up_bias[e]) + down_bias[e])
    with e = indices[t, k]

Sources: Shazeer et al., 2017, with the gated units of Shazeer, 2020; the clamped unit: OpenAI, 2025.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import FuselineError
from ._define import Cost, Kind, op
from ._grouped import Rows, grouped
from .glu import ACTIVATIONS

CLAMPED = "clamped_swiglu"
ALPHA, LIMIT = 1.702, 7.0
DEFAULTS = (None, None, "silu", False, ALPHA, LIMIT)
"""Of the arguments behind the matrices: biases, activation, interleaved, alpha, limit."""


@op(
    "moe(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor? gate_up_bias=None, "
    'Tensor? down_bias=None, str activation="silu", bool interleaved=False, float alpha=1.702, float limit=7.0) '
    "-> Tensor",
    kind=Kind.ANCHOR,
    whole=True,
)
def moe(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = ALPHA,
    limit: float = LIMIT,
) -> torch.Tensor:
    """hidden: [T, H]; indices: int64 [T, K], each in 0 … E − 1; weights: [T, K] of any floating-point type;
    gate_up: [E, 2I, H]; down: [E, H, I], either of them with any strides; gate_up_bias: [E, 2I]; down_bias: [E, H].
    The result: [T, H] in hidden's dtype; products are in that dtype, the sum over K in float32 at least.

    Of the 2I rows of gate_up, the first I are gates and the others ups; interleaved: the even ones and the odd ones.
    activation: a key of `glu.ACTIVATIONS`, or clamped_swiglu, min(g, limit)·σ(alpha·min(g, limit))·(clamp(u, ±limit) +
    1), which alone reads alpha and limit. An expert may occur more than once in a row of `indices`.
    """
    rows = Rows(indices, gate_up.shape[0])
    inner = gated(projected(hidden[rows.tokens], gate_up, gate_up_bias, rows), activation, interleaved, alpha, limit)
    y = projected(inner, down, down_bias, rows)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (rows.back(y).to(wide) * weights.unsqueeze(-1).to(wide)).sum(1).to(hidden.dtype)


@moe.fake
def _(hidden, indices, weights, gate_up, down, gate_up_bias=None, down_bias=None, activation="silu",
      interleaved=False, alpha=ALPHA, limit=LIMIT):  # fmt: skip
    check(hidden, indices, weights, gate_up.shape, down.shape, activation)
    return hidden.new_empty(hidden.shape)


@moe.cost
def cost(hidden, indices, weights, gate_up, down, *_):
    """An upper bound of the bytes: all matrices, of experts or of pairs, are read once where at least as many are
    chosen as there are."""
    pairs = indices.shape[0] * indices.shape[1]
    matrices = gate_up.shape[1] * gate_up.shape[2] + down.shape[1] * down.shape[2]
    read = min(pairs, gate_up.shape[0]) * matrices * gate_up.element_size()
    return Cost(2 * pairs * matrices, read + 2 * hidden.numel() * hidden.element_size())


@moe.backward
def _(ctx, grad):
    """Gradients of hidden, weights and, where one of them wants its own, of the experts: `fuseline::moe_backward`."""
    args = given(ctx, 5)
    experts = any(ctx.needs_input_grad[3:7])
    hidden, weights, *own = torch.ops.fuseline.moe_backward(grad, *args, experts)
    return wanted(ctx, hidden, None, weights, *own, None, None, None, None)


def given(ctx: Any, before: int) -> list[Any]:
    """A call's arguments as autograd saved them, defaults filled in; before: how many have none."""
    saved = iter(ctx.saved_tensors)
    args = [next(saved) if is_tensor else value for is_tensor, value in ctx.layout]
    return [*args, *DEFAULTS[len(args) - before :]]


def wanted(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    """Gradients of the arguments that want one."""
    return tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False))


def projected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, rows: Rows) -> torch.Tensor:
    """Each row through its expert's linear: x [S, n], weight [E, m, n], bias [E, m] → [S, m]."""
    y = grouped(x, weight.to(x.dtype), rows)
    return y if bias is None else y + bias[rows.experts].to(y.dtype)


def halves(both: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates and ups of [..., 2I]: [..., I] each."""
    if interleaved:
        return both[..., ::2], both[..., 1::2]
    gate, up = both.chunk(2, -1)
    return gate, up


def gated(both: torch.Tensor, activation: str, interleaved: bool, alpha: float, limit: float) -> torch.Tensor:
    """The gated unit of [..., 2I]: [..., I]."""
    gate, up = halves(both, interleaved)
    if activation != CLAMPED:
        return ACTIVATIONS[activation](gate) * up
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * torch.sigmoid(gate * alpha))


def check(hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, gate_up: torch.Size, down: torch.Size,
          activation: str) -> None:  # fmt: skip
    """Refuses shapes that do not belong together.

    Raises:
        FuselineError: says which.
    """
    if activation != CLAMPED and activation not in ACTIVATIONS:
        raise FuselineError(f"no activation '{activation}'", [f"known: {', '.join([*ACTIVATIONS, CLAMPED])}"])
    (_, twice, n), (_, m, inner) = gate_up, down
    if hidden.dim() != 2 or hidden.shape[1] != n or m != n or twice != 2 * inner or gate_up[0] != down[0]:
        raise FuselineError(
            f"hidden {tuple(hidden.shape)}, gate_up {tuple(gate_up)} and down {tuple(down)} do not belong together",
            ["hidden is [T, H], gate_up [E, 2I, H], down [E, H, I]"],
        )
    if indices.dim() != 2 or indices.shape[1] != weights.shape[1]:
        raise FuselineError(
            f"indices {tuple(indices.shape)} and weights {tuple(weights.shape)} are not both [T, K]",
        )


moe.lowers_to("codegen/templates/moe.py")
