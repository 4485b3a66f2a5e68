"""fuseline::ring_attention: attention in which keys and values go around the ranks, a block at a time.

Each rank keeps its queries and attends to one rank's keys after the other; partial results are joined by their
log-sum-exp (online softmax). Blocks of a causal mask are balanced by the zigzag layout: of 2·degree chunks rank r holds
r and 2·degree − 1 − r, so every rank does the same work and skips what is masked. Backward goes around once more, the
gradients of keys and values travelling with them.

Sources: Liu et al., 2023, "Ring Attention with Blockwise Transformers"; the zigzag layout as in Grattafiori et
al., 2024, section 3.3.2, and ring-flash-attention.

Both ops stay whole to the end: the exchange overlaps the attention inside of them. They compute by PyTorch's flash
attention (float32, float64 and bfloat16 on CPUs; 16-bit types on GPUs).
"""

from __future__ import annotations

from typing import Any

import torch

from ._define import LIBRARY

_SETTINGS = "float scale, bool causal, SymInt length, int rank, int degree, str group"
LIBRARY.define(f"ring_attention(Tensor q, Tensor k, Tensor v, {_SETTINGS}) -> (Tensor, Tensor)")
LIBRARY.define(
    "ring_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor)"
)
aten = torch.ops.aten
Part = tuple[slice, slice, bool]


def pairing(rank: int, other: int, causal: bool, block: int, length: int) -> Part | None:
    """Which of a rank's queries see which of another rank's keys, and whether by a causal mask among themselves.

    causal: blocks are two chunks each, in zigzag; else they are contiguous, and keys beyond `length` do not exist.
    """
    everything = slice(0, block)
    if not causal:
        exist = min(max(length - other * block, 0), block)
        return (everything, slice(0, exist), False) if exist else None
    if other == rank:
        return everything, everything, True
    half = block // 2
    return (everything, slice(0, half), False) if other < rank else (slice(half, block), everything, False)


def _start(x: torch.Tensor, rank: int, degree: int, group: str) -> torch.Tensor:
    """Begins to send x to the next rank, and to receive that of the previous one."""
    size = x.numel()
    there = [size if r == (rank + 1) % degree else 0 for r in range(degree)]
    here = [size if r == (rank - 1) % degree else 0 for r in range(degree)]
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous().view(-1), here, there, group)


def _arrived(sent: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return torch.ops._c10d_functional.wait_tensor(sent).view(shape)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float) -> tuple[Any, ...]:
    k, v = (_for_queries(x, q) for x in (k, v))
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    causal: bool, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    wide = [_for_queries(x, q) for x in (k, v)]
    if q.device.type == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, *wide, out, lse, 0.0, causal, scale=scale
        )
    else:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        offset = torch.zeros((), dtype=torch.uint64, device=q.device)
        found = aten._scaled_dot_product_flash_attention_backward(
            grad, q, *wide, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset, scale=scale
        )
    dq, dk, dv = found
    groups = q.shape[1] // k.shape[1]
    return dq, *(d if groups == 1 else d.unflatten(1, (-1, groups)).sum(2) for d in (dk, dv))


def _for_queries(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Key heads repeated for their query heads."""
    groups = q.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, 1)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool, length: int, rank: int, degree: int,
    group: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """q: [B, H, block, D], k and v: [B, H/g, block, D], this rank's blocks → the result, shaped like q, and the
    log-sum-exp of its logits over all keys, [B, H, block]."""
    block = q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    total = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=wide, device=q.device)
    pair = torch.stack((k, v))
    for step in range(degree):
        sent = _start(pair, rank, degree, group) if step + 1 < degree else None
        seen = pairing(rank, (rank - step) % degree, causal, block, length)
        if seen is not None:
            rows, keys, masked = seen
            out, mine = _forward(q[:, :, rows], pair[0][:, :, keys], pair[1][:, :, keys], masked, scale)
            before, mine = lse[:, :, rows], mine.to(wide)
            joined = torch.logaddexp(before, mine)
            total[:, :, rows] = (
                total[:, :, rows] * (before - joined).exp()[..., None] + out * (mine - joined).exp()[..., None]
            )
            lse[:, :, rows] = joined
        if sent is not None:
            pair = _arrived(sent, pair.shape)
    return total.to(q.dtype), lse


def backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    scale: float, causal: bool, length: int, rank: int, degree: int, group: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of q, k and v: given the log-sum-exp over all keys, each pair of blocks has its share of them."""
    block = q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    pair = torch.stack((k, v))
    carried = torch.zeros(pair.shape, dtype=wide, device=q.device)
    for step in range(degree):
        sent = _start(pair, rank, degree, group) if step + 1 < degree else None
        seen = pairing(rank, (rank - step) % degree, causal, block, length)
        if seen is not None:
            rows, keys, masked = seen
            part = _backward(
                grad[:, :, rows].contiguous(), q[:, :, rows].contiguous(), pair[0][:, :, keys].contiguous(),
                pair[1][:, :, keys].contiguous(), out[:, :, rows].contiguous(), lse[:, :, rows].contiguous(),
                masked, scale,
            )  # fmt: skip
            dq[:, :, rows] += part[0]
            carried[0][:, :, keys] += part[1]
            carried[1][:, :, keys] += part[2]
        carried = _arrived(_start(carried, rank, degree, group), carried.shape)  # after the last step they are home
        if sent is not None:
            pair = _arrived(sent, pair.shape)
    return dq.to(q.dtype), carried[0].to(k.dtype), carried[1].to(v.dtype)


def _fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


def _fake_backward(grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)


def _derivative(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    found = torch.ops.fuseline.ring_attention_backward.default(grad, *ctx.saved_tensors, *ctx.settings)
    return (*found, *(None for _ in ctx.settings))


for _name, _function, _abstract in (
    ("ring_attention", forward, _fake), ("ring_attention_backward", backward, _fake_backward)
):  # fmt: skip
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fuseline::{_name}", _abstract, lib=LIBRARY)
torch.library.register_autograd("fuseline::ring_attention", _derivative, setup_context=_save, lib=LIBRARY)

ring_attention = torch.ops.fuseline.ring_attention.default
