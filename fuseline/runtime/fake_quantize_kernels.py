"""Fake quantization as one kernel forward and one backward: what `fake_quantize.py` launches.

A program takes one group of channels of one row, piece by piece; what is summed over the group stays in registers, so
that nothing is written but the results and results do not depend on the order of programs. All is computed in float32,
divisions rounded to nearest: codes are those of the naive twins, bit by bit.
"""

import triton
import triton.language as tl


@triton.jit
def half_even(x):
    """x to the nearest integer, ties to even."""
    down = tl.floor(x)
    rest = x - down
    odd = down - 2.0 * tl.floor(0.5 * down)
    return tl.where((rest > 0.5) | ((rest == 0.5) & (odd == 1.0)), down + 1.0, down)


@triton.jit
def nearest(scaled, SHIFT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, SIGNS: tl.constexpr):
    """The nearest number of a format: whole numbers plus SHIFT, of LEAST to MOST, or the sign alone."""
    if SIGNS:
        number = tl.where(scaled < 0, -1.0, 1.0)
    else:
        number = half_even(scaled - SHIFT) + SHIFT
        number = tl.where(number < LEAST, LEAST, tl.where(number > MOST, MOST, number))
    return number


@triton.jit
def scale_of(alpha, least_range, unit, SHORT: tl.constexpr):
    """The scale of a range as it is stored, in bfloat16 if SHORT."""
    scale = tl.div_rn(tl.maximum(alpha, least_range), unit)
    if SHORT:
        scale = scale.to(tl.bfloat16).to(tl.float32)
    return scale


@triton.jit
def learned_forward(
    x, alpha, y, least_range, unit,
    SHIFT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, SIGNS: tl.constexpr, SHORT: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = scale · nearest(x / scale), scale = max(α, least) / unit as it is stored."""
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(tl.load(alpha + row), least_range, unit, SHORT)
    for start in range(0, GROUP, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < GROUP
        value = tl.load(x + row * GROUP + at, mask=inside, other=0.0).to(tl.float32)
        number = nearest(tl.div_rn(value, scale), SHIFT, LEAST, MOST, SIGNS)
        tl.store(y + row * GROUP + at, (number * scale).to(y.dtype.element_ty), mask=inside)


@triton.jit
def learned_backward(
    grad, x, alpha, of_x, of_alpha, least_range, unit, low, high, below, above, factor,
    SHIFT: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, SIGNS: tl.constexpr, SHORT: tl.constexpr,
    FOLLOWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x and of α: see `formats/learned.py`."""
    row = tl.program_id(0).to(tl.int64)
    scale = scale_of(tl.load(alpha + row), least_range, unit, SHORT)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, GROUP, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < GROUP
        value = tl.load(x + row * GROUP + at, mask=inside, other=0.0).to(tl.float32)
        upper = tl.load(grad + row * GROUP + at, mask=inside, other=0.0).to(tl.float32)
        number = nearest(tl.div_rn(value, scale), SHIFT, LEAST, MOST, SIGNS)
        ratio = tl.div_rn(value, scale * unit)
        passes = (ratio >= low) & (ratio <= high)
        along = tl.div_rn(number, unit)
        if FOLLOWS:
            along = tl.where(passes, along - ratio, tl.where(ratio < low, below, above))
        total += upper * along
        tl.store(of_x + row * GROUP + at, tl.where(passes, upper, 0.0).to(of_x.dtype.element_ty), mask=inside)
    tl.store(of_alpha + row, tl.sum(total, 0) * factor)


@triton.jit
def largest_forward(x, y, top, least, most, SHORT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """y = scale · clamp(round(x / scale)), scale = max|x| / top of the group: symmetric integers of values and weights.

    SHORT: whether scales are kept in bfloat16. A NaN or an infinity makes NaN of its group.
    """
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.float32)
    spoiled = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, GROUP, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * GROUP + at, mask=at < GROUP, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
        spoiled += 0.0 * value
    scale = tl.div_rn(tl.max(largest, 0), top)
    if SHORT:
        scale = scale.to(tl.bfloat16).to(tl.float32)
    scale = tl.where(scale > 0, scale, 1.0) + tl.sum(spoiled, 0)
    for start in range(0, GROUP, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < GROUP
        value = tl.load(x + row * GROUP + at, mask=inside, other=0.0).to(tl.float32)
        number = half_even(tl.div_rn(value, scale))
        number = tl.where(number < least, least, tl.where(number > most, most, number))
        tl.store(y + row * GROUP + at, (number * scale).to(y.dtype.element_ty), mask=inside)
