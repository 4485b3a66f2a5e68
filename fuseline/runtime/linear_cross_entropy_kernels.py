"""The pass over rows of logits in a fused loss: what `linear_cross_entropy.py` launches.

A program takes one row and reads it twice: for the largest logit and the sum of exponentials beside it, kept up to date
block by block (Milakov and Gimelshein, 2018, "Online normalizer calculation for softmax"), and for the gradient, which
it writes over the logits. All is computed in float32. A row of 128K 16-bit logits stays in the L2 cache in between.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """(1 − e)/(1 + e) with e = exp(−2|x|), which cancels near zero: there the odd Taylor polynomial of degree 9."""
    square = x * x
    near = x + x * square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))


@triton.jit
def read(row, at, inside, scale, softcap, CAPPED: tl.constexpr):
    """Logits as the loss takes them, and tanh of them under the cap (0 without one)."""
    x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32) * scale
    flat = x * 0
    if CAPPED:
        flat = tanh(x / softcap)
        x = softcap * flat
    return x, flat


@triton.jit
def cross_entropy_rows(
    logits, target, factors, losses, stride, ignore, smoothing, scale, softcap,
    VOCABULARY: tl.constexpr, CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, WANTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its loss, and with WANTS its gradient times its factor over its logits. Ignored: loss and gradient 0."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    chosen = tl.load(target + index)
    if chosen == ignore:
        tl.store(losses + index, 0.0)
        if WANTS:
            for start in range(0, VOCABULARY, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(row + at, tl.zeros([BLOCK], logits.dtype.element_ty), mask=at < VOCABULARY)
        return
    label, _at_label = read(row, chosen, chosen >= 0, scale, softcap, CAPPED)  # before any warp writes over it
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    plain = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCABULARY, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < VOCABULARY
        x, _flat = read(row, at, inside, scale, softcap, CAPPED)
        plain += tl.where(inside, x, 0.0)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(largest, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = higher
    top = tl.max(largest, 0)
    normalizer = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    loss = normalizer - (1 - smoothing) * label
    if SMOOTHED:
        loss -= smoothing * (tl.sum(plain, 0) / VOCABULARY)
    tl.store(losses + index, loss)
    if WANTS:
        factor = tl.load(factors + index).to(tl.float32) * scale
        for start in range(0, VOCABULARY, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < VOCABULARY
            x, flat = read(row, at, inside, scale, softcap, CAPPED)
            gradient = tl.exp(x - normalizer) - tl.where(at == chosen, 1 - smoothing, 0.0)
            if SMOOTHED:
                gradient -= smoothing / VOCABULARY
            gradient *= factor
            if CAPPED:
                gradient *= 1 - flat * flat
            tl.store(row + at, gradient.to(logits.dtype.element_ty), mask=inside)
