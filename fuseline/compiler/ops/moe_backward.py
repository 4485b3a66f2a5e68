"""fuseline::moe_backward: the derivative of fuseline::moe, opaque like it, since its products are grouped too.

What the forward has in its middle is computed again, so that only its arguments are kept.
"""

from __future__ import annotations

import torch

from ._define import Kind, op
from ._grouped import Rows, grouped, outer, summed
from .moe import CLAMPED, gated, halves, projected


@op(
    "moe_backward(Tensor grad, Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str activation, bool interleaved, float alpha, float limit, "
    "bool experts) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kind=Kind.OTHER,
    whole=True,
)
def moe_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    experts: bool,
) -> tuple[torch.Tensor, ...]:
    """grad: [T, H], of the result; the others as for `moe`. Gradients of hidden, weights, gate_up, down, gate_up_bias
    and down_bias, each of its tensor's shape and dtype; empty ones of the last four without `experts`, and of a bias
    that is not there. On a GPU the gradients of experts wait for the device.
    """
    rows = Rows(indices, gate_up.shape[0])
    x = hidden[rows.tokens]
    both = projected(x, gate_up, gate_up_bias, rows)
    inner = gated(both, activation, interleaved, alpha, limit)
    y = projected(inner, down, down_bias, rows)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    at = grad[rows.tokens].to(wide)
    of_weights = rows.back((at * y.to(wide)).sum(-1)).to(weights.dtype)
    grad_y = (at * weights.reshape(-1)[rows.order].to(wide).unsqueeze(-1)).to(hidden.dtype)
    grad_inner = grouped(grad_y, down.to(x.dtype).transpose(1, 2), rows)
    grad_both = _through(grad_inner, both, activation, interleaved, alpha, limit)
    grad_x = grouped(grad_both, gate_up.to(x.dtype).transpose(1, 2), rows)
    of_hidden = rows.back(grad_x).to(wide).sum(1).to(hidden.dtype)
    if not experts:
        return of_hidden, of_weights, *(hidden.new_empty(0) for _ in range(4))
    of_biases = (
        hidden.new_empty(0) if bias is None else summed(g.to(wide), rows).to(bias.dtype)
        for g, bias in ((grad_both, gate_up_bias), (grad_y, down_bias))
    )
    of_gate_up, of_down = outer(grad_both, x, rows).to(gate_up.dtype), outer(grad_y, inner, rows).to(down.dtype)
    return of_hidden, of_weights, of_gate_up, of_down, *of_biases


@moe_backward.fake
def _(grad, hidden, indices, weights, gate_up, down, gate_up_bias, down_bias, activation, interleaved, alpha, limit,
      experts):  # fmt: skip
    own = [gate_up, down, gate_up_bias, down_bias]
    made = [
        hidden.new_empty(0) if t is None or not experts else t.new_empty(t.shape, dtype=t.dtype) for t in own
    ]  # fmt: skip
    return hidden.new_empty(hidden.shape), weights.new_empty(weights.shape), *made


def _through(
    grad: torch.Tensor, both: torch.Tensor, activation: str, interleaved: bool, alpha: float, limit: float
) -> torch.Tensor:
    """The gradient of [S, 2I] from that of the gated unit [S, I]."""
    gate, up = halves(both, interleaved)
    if activation == CLAMPED:
        low, s = gate.clamp(max=limit), torch.sigmoid(gate.clamp(max=limit) * alpha)
        of_gate = grad * (up.clamp(-limit, limit) + 1) * s * (1 + alpha * low * (1 - s)) * (gate <= limit)
        of_up = grad * low * s * (up.abs() <= limit)
    else:
        value, slope = _slopes(activation, gate)
        of_gate, of_up = grad * up * slope, grad * value
    if interleaved:
        return torch.stack((of_gate, of_up), -1).flatten(-2)
    return torch.cat((of_gate, of_up), -1)


def _slopes(activation: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An activation and its derivative, as ATen has them."""
    aten, one = torch.ops.aten, torch.ones_like(x)
    if activation == "silu":
        return aten.silu(x), aten.silu_backward(one, x)
    if activation in ("gelu", "gelu_tanh"):
        kind = "tanh" if activation == "gelu_tanh" else "none"
        return aten.gelu(x, approximate=kind), aten.gelu_backward(one, x, approximate=kind)
    if activation == "relu":
        return aten.relu(x), (x > 0).to(x.dtype)
    value = torch.sigmoid(x)
    return value, value * (1 - value)
