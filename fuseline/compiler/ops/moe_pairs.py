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
from ._define import Cost, Kind, op
from .moe import ALPHA, LIMIT, check, moe


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


@moe_pairs.cost
def _(hidden, indices, weights, gate_up, down, *_):
    """An upper bound of the bytes: every row of words is read once where there are at least as many pairs as rows."""
    pairs = indices.shape[0] * indices.shape[1]
    matrices = gate_up.shape[1] * gate_up.shape[2] + down.shape[1] * down.shape[2]
    read = min(pairs, gate_up.shape[0]) * matrices * gate_up.element_size()
    return Cost(2 * pairs * matrices, read + 2 * hidden.numel() * hidden.element_size())


@moe_pairs.backward
def _(ctx, grad):
    """Gradients of hidden and weights, and of biases where one of them wants its own: `fuseline::moe_backward`."""
    saved = iter(ctx.saved_tensors)
    args = [next(saved) if is_tensor else value for is_tensor, value in ctx.layout]
    args += [None, None, "silu", False, ALPHA, LIMIT][len(args) - 7 :]
    hidden, indices, weights, gate_up, down, rows, slots, *rest = args
    both, out = (unpack_experts(words, rows, slots).to(hidden.dtype) for words in (gate_up, down))
    needed = ctx.needs_input_grad
    given = torch.ops.fuseline.moe_backward(grad, hidden, indices, weights, both, out, *rest, any(needed[7:9]))
    found = (given[0], None, given[1], None, None, None, None, given[4], given[5], None, None, None, None)
    return tuple(g if need else None for g, need in zip(found, needed, strict=False))


moe_pairs.lowers_to("codegen/templates/moe.py")
