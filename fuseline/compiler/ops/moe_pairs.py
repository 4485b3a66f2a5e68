"""fuseline::moe_pairs: fuseline::moe with experts packed in pairs: each word of a matrix holds both.

The packing is `formats/pairs.py`'s:

    bit     15   14   13   12   11 … 7          6 … 0
            S0   S1   M0   M1   exponent − 112  mantissa of bfloat16

    slot p = 0, 1:   w = 0 where (word >> (13 − p)) & 1 is 0, else the bfloat16 with bits
                     ((word >> (15 − p)) & 1) << 15 | ((word & 0x0FFF) + (112 << 7))
    slot 2:          w = the bfloat16 with the word's bits: an expert that shares its row with none

Source: PuzzleMoE (2025).
"""

from __future__ import annotations

import torch

from ..formats.pairs import unpack_experts
from ._define import Kind, op
from .moe import ALPHA, LIMIT, check, cost, given, moe, wanted


@op(
    "moe_pairs(Tensor hidden, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, Tensor rows, Tensor slots, "
    'Tensor? gate_up_bias=None, Tensor? down_bias=None, str activation="silu", bool interleaved=False, '
    "float alpha=1.702, float limit=7.0) -> Tensor",
    kind=Kind.ANCHOR,
    whole=True,
)
def moe_pairs(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activation: str = "silu",
    interleaved: bool = False,
    alpha: float = ALPHA,
    limit: float = LIMIT,
) -> torch.Tensor:
    """gate_up: int16 words [R, 2I, H]; down: int16 words [R, H, I]; rows, slots: int32 [E], where expert e is: row
    rows[e] of either tensor, in its slot slots[e], which is 0 or 1 of a pair, or 2 of an expert alone. E/2 ≤ R ≤ E.

    The others and the result are `moe`'s: hidden [T, H], indices int64 [T, K] of experts 0 … E − 1, weights [T, K],
    gate_up_bias [E, 2I] and down_bias [E, H], each expert's own. Hidden and weights have gradients, experts have none.
    """
    both, out = (unpack_experts(words, rows, slots).to(hidden.dtype) for words in (gate_up, down))
    return moe.naive(  # type: ignore[no-any-return]
        hidden, indices, weights, both, out, gate_up_bias, down_bias, activation, interleaved, alpha, limit
    )


@moe_pairs.fake
def _(hidden, indices, weights, gate_up, down, rows, slots, gate_up_bias=None, down_bias=None, activation="silu",
      interleaved=False, alpha=ALPHA, limit=LIMIT):  # fmt: skip
    check(hidden, indices, weights, gate_up.shape, down.shape, activation)
    return hidden.new_empty(hidden.shape)


moe_pairs.cost(cost)


@moe_pairs.backward
def _(ctx, grad):
    """Gradients of hidden and weights, and of biases where one of them wants its own: `fuseline::moe_backward`."""
    hidden, indices, weights, gate_up, down, rows, slots, *rest = given(ctx, 7)
    both, out = (unpack_experts(words, rows, slots).to(hidden.dtype) for words in (gate_up, down))
    biases = any(ctx.needs_input_grad[7:9])
    found = torch.ops.fuseline.moe_backward(grad, hidden, indices, weights, both, out, *rest, biases)
    places = (found[0], None, found[1], None, None, None, None, found[4], found[5], None, None, None, None)
    return wanted(ctx, *places)


moe_pairs.lowers_to("codegen/templates/moe.py")
