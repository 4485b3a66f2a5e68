"""Elementary functions as Triton expressions, in float32, float64 and integers, without libdevice.

Each takes operand texts (names or parenthesised expressions; they may be repeated) and the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .dtypes import literal

Unary = Callable[[str, torch.dtype], str]


def divide(a: str, b: str, dtype: torch.dtype) -> str:
    """a / b, rounded to nearest: Triton's `/` may be two units in the last place off in float32."""
    return f"tl.div_rn({a}, {b})" if dtype == torch.float32 else f"{a} / {b}"


def quotient(a: str, b: str, dtype: torch.dtype) -> str:
    """a / b where an operand is no more exact than Triton's `/`, which takes half the instructions of `divide`."""
    return f"{a} / {b}"


def square_root(x: str, dtype: torch.dtype) -> str:
    return f"tl.sqrt_rn({x})" if dtype == torch.float32 else f"tl.sqrt({x})"


def floor_divide(a: str, b: str, dtype: torch.dtype) -> str:
    """Integer division towards minus infinity; Triton's truncates."""
    if dtype == torch.uint8:
        return f"{a} // {b}"
    return f"{a} // {b} - (({a} % {b} != 0) & (({a} < 0) != ({b} < 0))).to({a}.dtype)"


def remainder(a: str, b: str, dtype: torch.dtype) -> str:
    """a mod b with the sign of b; Triton's `%` has the sign of a."""
    if dtype == torch.uint8:
        return f"{a} % {b}"
    return f"tl.where(({a} % {b} != 0) & (({a} < 0) != ({b} < 0)), {a} % {b} + {b}, {a} % {b})"


def extremum(sign: str, a: str, b: str) -> str:
    """The larger (sign ">") or smaller of a and b; no number if either is none, as in PyTorch."""
    return f"tl.where(({a} {sign} {b}) | ({a} != {a}), {a}, {b})"


def power(x: str, exponent: float, dtype: torch.dtype) -> str | None:
    """x ** exponent, or None where no accurate expression is at hand."""
    if exponent == int(exponent) and 0 <= abs(exponent) <= 16:
        steps = abs(int(exponent))
        if exponent < 0 and not dtype.is_floating_point:
            return None
        if steps == 0:
            return f"tl.where({x} == {x}, {literal(1, dtype)}, {literal(1, dtype)})"
        product = _chain(x, steps)
        return product if exponent > 0 else divide(literal(1, dtype), f"({product})", dtype)
    if not dtype.is_floating_point:
        return None
    if exponent == 0.5:
        return square_root(x, dtype)
    if exponent == -0.5:
        return f"tl.rsqrt({x})"
    if abs(exponent) <= 8:
        return f"tl.exp2({literal(exponent, dtype)} * tl.log2({x}))"
    return None


def _chain(x: str, steps: int) -> str:
    """x·x·… by squaring: the compiler computes repeated factors once."""
    if steps <= 3:
        return " * ".join([x] * steps)
    half = _chain(x, steps // 2)
    return f"({half}) * ({half}){f' * {x}' if steps % 2 else ''}"


def exponential(base: float, x: str, dtype: torch.dtype) -> str:
    """base ** x for base > 0."""
    return f"tl.exp2({x})" if base == 2 else f"tl.exp2({x} * {literal(math.log2(base), dtype)})"


def sigmoid(x: str, dtype: torch.dtype) -> str:
    return quotient(literal(1, dtype), f"(1 + tl.exp(-{x}))", dtype)


def silu(x: str, dtype: torch.dtype) -> str:
    return quotient(x, f"(1 + tl.exp(-{x}))", dtype)


def gelu(x: str, dtype: torch.dtype) -> str:
    return f"0.5 * {x} * (1 + tl.erf({x} * {literal(math.sqrt(0.5), dtype)}))"


def gelu_tanh(x: str, dtype: torch.dtype) -> str:
    """0.5·x·(1 + tanh(u)) = x·sigmoid(2u), u = √(2/π)·(x + 0.044715·x³)."""
    scale, cubic = literal(-2 * math.sqrt(2 / math.pi), dtype), literal(0.044715, dtype)
    return quotient(x, f"(1 + tl.exp({scale} * ({x} + {cubic} * {x} * {x} * {x})))", dtype)


def relu(x: str, dtype: torch.dtype) -> str:
    return f"tl.where({x} < 0, {literal(0, dtype)}, {x})"


def tanh(x: str, dtype: torch.dtype) -> str:
    """(1 − e)/(1 + e) with e = exp(−2|x|), which cancels near zero: there the odd Taylor polynomial of degree 9.

    At |x| = 0.1 (float32) the first omitted term is 1e-12 of x; in float64 the bound 0.01 makes it 1e-22.
    """
    one = literal(1, dtype)
    bound = literal(0.1 if dtype == torch.float32 else 0.01, dtype)
    exponential = f"tl.exp(-2 * tl.abs({x}))"
    far = divide(f"({one} - {exponential})", f"({one} + {exponential})", dtype)
    near = ""
    for coefficient in (62 / 2835, -17 / 315, 2 / 15, -1 / 3):
        near = f"{literal(coefficient, dtype)}{f' + {x} * {x} * ({near})' if near else ''}"
    return (
        f"tl.where(tl.abs({x}) < {bound}, {x} + {x} * {x} * {x} * ({near}), "
        f"tl.where({x} < 0, -({far}), {far}))"
    )  # fmt: skip


def log1p(x: str, dtype: torch.dtype) -> str:
    """log(u)·x/(u − 1), u = 1 + x, which undoes the rounding of u (Goldberg, 1991, theorem 4)."""
    one = literal(1, dtype)
    quotient = divide(f"(tl.log({one} + {x}) * {x})", f"(({one} + {x}) - {one})", dtype)
    return (
        f'tl.where({one} + {x} == {one}, {x}, tl.where(tl.abs({x}) == float("inf"), tl.log({one} + {x}), {quotient}))'
    )


def round_half_even(x: str, dtype: torch.dtype, down: str | None = None) -> str:
    """x to the nearest integer. `down` is the name of tl.floor(x), where the kernel has it."""
    if not dtype.is_floating_point:
        return x
    down, half = down or f"tl.floor({x})", literal(0.5, dtype)
    is_odd = f"({down} - 2 * tl.floor({half} * {down}) == 1)"
    return (
        f"tl.where(({x} - {down} > {half}) | (({x} - {down} == {half}) & {is_odd}), {down} + 1, {down})"
    )  # fmt: skip


def trunc(x: str, dtype: torch.dtype) -> str:
    return f"tl.where({x} < 0, -tl.floor(-{x}), tl.floor({x}))" if dtype.is_floating_point else x


def _integer_kept(function: str) -> Unary:
    return lambda x, dtype: f"{function}({x})" if dtype.is_floating_point else x


def _call(function: str) -> Unary:
    return lambda x, dtype: f"{function}({x})"


def sign(x: str, dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return x
    zero, one = literal(0, dtype), literal(1, dtype)
    negative = zero if dtype == torch.uint8 else literal(-1, dtype)
    return f"tl.where({x} > 0, {one}, tl.where({x} < 0, {negative}, {zero}))"


UNARY: dict[str, Unary] = {
    "neg.default": lambda x, dtype: f"-{x}",
    "abs.default": lambda x, dtype: x if dtype == torch.uint8 else f"tl.abs({x})",
    "square.default": lambda x, dtype: f"{x} * {x}",
    "exp.default": _call("tl.exp"),
    "exp2.default": _call("tl.exp2"),
    "log.default": _call("tl.log"),
    "log2.default": _call("tl.log2"),
    "log1p.default": log1p,
    "sqrt.default": square_root,
    "rsqrt.default": _call("tl.rsqrt"),
    "reciprocal.default": lambda x, dtype: divide(literal(1, dtype), x, dtype),
    "sin.default": _call("tl.sin"),
    "cos.default": _call("tl.cos"),
    "erf.default": _call("tl.erf"),
    "tanh.default": tanh,
    "sigmoid.default": sigmoid,
    "silu.default": silu,
    "relu.default": relu,
    "floor.default": _integer_kept("tl.floor"),
    "ceil.default": _integer_kept("tl.ceil"),
    "trunc.default": trunc,
    "round.default": round_half_even,
    "sign.default": sign,
}

ACTIVATIONS: dict[str, Unary] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "relu": relu,
    "sigmoid": sigmoid,
}


def _silu_backward(grad: str, x: str) -> str:
    gate = f"(1 / (1 + tl.exp(-{x})))"
    return f"{grad} * {gate} * (1 + {x} * (1 - {gate}))"


#: Derivatives by op name, with operands in the order of their schemas.
BACKWARD: dict[str, Callable[[str, str], str]] = {
    "silu_backward": _silu_backward,
    "sigmoid_backward": lambda grad, y: f"{grad} * (1 - {y}) * {y}",
    "tanh_backward": lambda grad, y: f"{grad} * (1 - {y} * {y})",
}
