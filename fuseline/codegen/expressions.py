"""Pointwise ops as Triton expressions.

Inside a kernel a value is held in the *compute type* of its dtype: float32 for float16 and bfloat16, otherwise the
dtype itself. A fused chain is not rounded between its ops: 16-bit values round where the graph casts explicitly
(`aten._to_copy`, `aten.to.*`) and where they are stored. So a kernel is at least as accurate as the ops it replaces.

The expressions use only what Triton's interpreter and every GPU back end have: no libdevice. `RULES` maps each
overload to the function that writes it; the small formulas behind them are in `formulas.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..compiler.ops import glu
from ..compiler.traits import arguments, overloads
from . import formulas
from .call import Call, Unsupported, dtype_of
from .dtypes import cast, compute_dtype, is_supported, literal, pointer_type, rounded, triton_type
from .kernel import Refusal

__all__ = ["RULES", "compute_dtype", "emit", "pointer_type", "triton_type"]


Rule = Callable[[Call], str]
RULES: dict[Any, Rule] = {}


def emit(node: torch.fx.Node, operands: Mapping[torch.fx.Node, str]) -> str | Refusal:
    """The Triton expression of a pointwise node.

    Args:
        node: a call of an overload in `RULES`, with `meta["val"]`.
        operands: for each input node a name (or a parenthesised expression) that holds its value in the compute type
            of its dtype; SymInt inputs are int64.

    Returns:
        An expression in the compute type of the node's dtype, without outer parentheses; or a Refusal.
    """
    rule = RULES.get(node.target)
    if rule is None:
        return Refusal(f"{node.target} is not a pointwise op the emitter knows")
    dtype = dtype_of(node)
    unknown = [d for d in (dtype, *(dtype_of(n) for n in node.all_input_nodes)) if not is_supported(d)]
    if unknown:
        return Refusal(f"{node.name}: kernels do not hold {unknown[0]}")
    try:
        return rule(Call(node, arguments(node), operands, dtype))
    except Unsupported as reason:
        return Refusal(f"{node.name}: {reason}")


def rule(names: str) -> Callable[[Rule], Rule]:
    """Registers the decorated function for the overloads named."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads(names), function))
        return function

    return register


def _formula(names: str, formula: Callable[[str, torch.dtype], str]) -> None:
    """Registers `formula(x, compute dtype)` for unary overloads."""

    def write(call: Call) -> str:
        return formula(call.operand("self"), compute_dtype(call.dtype))

    RULES.update(dict.fromkeys(overloads(names), write))


for _name, _function in formulas.UNARY.items():
    _formula(_name, _function)


@rule("add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar")
def _add(call: Call) -> str:
    kind = call.node.target._opname  # type: ignore[union-attr]
    a, b = call.operand("self"), call.operand("other")
    alpha = call.number("alpha")
    if call.dtype == torch.bool:
        if kind != "add" or alpha != 1:
            raise Unsupported("only a plain sum of booleans is defined")
        return f"{a} | {b}"
    factor = "" if alpha == 1 else f" * {literal(alpha, compute_dtype(call.dtype))}"
    if kind == "rsub":
        return f"{b} - {a}{factor}"
    return f"{a} {'+' if kind == 'add' else '-'} {b}{factor}"


@rule("mul.Tensor mul.Scalar")
def _multiply(call: Call) -> str:
    return f"{call.operand('self')} {'&' if call.dtype == torch.bool else '*'} {call.operand('other')}"


@rule("addcmul.default")
def _addcmul(call: Call) -> str:
    product = f"{call.operand('tensor1')} * {call.operand('tensor2')}"
    value = call.number("value")
    factor = "" if value == 1 else f"{literal(value, compute_dtype(call.dtype))} * "
    return f"{call.operand('self')} + {factor}{product}"


@rule("div.Tensor div.Scalar")
def _divide(call: Call) -> str:
    return formulas.divide(call.operand("self"), call.operand("other"), compute_dtype(call.dtype))


@rule("div.Tensor_mode div.Scalar_mode floor_divide.default floor_divide.Scalar")
def _divide_rounding(call: Call) -> str:
    mode = call.given.get("rounding_mode", "floor")
    if mode is None:
        return _divide(call)
    a, b = call.operand("self"), call.operand("other")
    if call.dtype.is_floating_point:
        raise Unsupported(f"{mode} division of floating-point numbers")
    return f"{a} // {b}" if mode == "trunc" else formulas.floor_divide(a, b, call.dtype)


@rule("remainder.Tensor remainder.Scalar")
def _remainder(call: Call) -> str:
    return formulas.remainder(call.operand("self"), call.operand("other"), call.dtype)


@rule("pow.Tensor_Scalar")
def _power(call: Call) -> str:
    text = formulas.power(call.operand("self"), call.number("exponent"), compute_dtype(call.dtype))
    if text is None:
        raise Unsupported(f"exponent {call.number('exponent')} on {call.dtype}")
    return text


@rule("pow.Scalar")
def _power_of_scalar(call: Call) -> str:
    base = float(call.number("self"))
    if base <= 0 or not call.dtype.is_floating_point:
        raise Unsupported(f"the power of {base} on {call.dtype}")
    return formulas.exponential(base, call.operand("exponent"), compute_dtype(call.dtype))


@rule("gelu.default")
def _gelu(call: Call) -> str:
    formula = formulas.gelu_tanh if call.given["approximate"] == "tanh" else formulas.gelu
    return formula(call.operand("self"), compute_dtype(call.dtype))


@rule("leaky_relu.default")
def _leaky_relu(call: Call) -> str:
    x, slope = call.operand("self"), literal(call.number("negative_slope"), compute_dtype(call.dtype))
    return f"tl.where({x} > 0, {x}, {slope} * {x})"


@rule("softplus.default")
def _softplus(call: Call) -> str:
    compute = compute_dtype(call.dtype)
    beta, threshold = literal(call.number("beta"), compute), literal(call.number("threshold"), compute)
    x = call.operand("self")
    smooth = formulas.divide(formulas.log1p(f"tl.exp({x} * {beta})", compute), beta, compute)
    return f"tl.where({x} * {beta} > {threshold}, {x}, {smooth})"


@rule("maximum.default minimum.default")
def _extremum(call: Call) -> str:
    a, b = call.operand("self"), call.operand("other")
    return formulas.extremum(">" if "maximum" in str(call.node.target) else "<", a, b)


@rule("clamp.default clamp.Tensor clamp_min.default clamp_max.default")
def _clamp(call: Call) -> str:
    text = call.operand("self")
    for bound, sign in (("min", "<"), ("max", ">")):
        if call.given.get(bound) is not None:
            limit = call.operand(bound)
            replace = f"{text} {sign} {limit}"
            if isinstance(call.given[bound], torch.fx.Node) and call.dtype.is_floating_point:
                replace = f"({replace}) | ({limit} != {limit})"  # a bound that is no number gives no number
            text = f"tl.where({replace}, {limit}, {text})"
    return text


@rule("where.self where.ScalarSelf where.ScalarOther where.Scalar")
def _where(call: Call) -> str:
    return f"tl.where({call.operand('condition', torch.bool)}, {call.operand('self')}, {call.operand('other')})"


@rule("masked_fill.Scalar masked_fill.Tensor")
def _masked_fill(call: Call) -> str:
    return f"tl.where({call.operand('mask', torch.bool)}, {call.operand('value')}, {call.operand('self')})"


@rule("isnan.default isinf.default")
def _is_special(call: Call) -> str:
    source = dtype_of(call.given["self"])
    x = call.operand("self", source)
    if not source.is_floating_point:
        return f"({x} != {x})"
    return f"{x} != {x}" if "isnan" in str(call.node.target) else f'tl.abs({x}) == float("inf")'


def _comparison(names: str, sign: str) -> None:
    def write(call: Call) -> str:
        dtype = call.promoted("self", "other")
        return f"{call.operand('self', dtype)} {sign} {call.operand('other', dtype)}"

    RULES.update(dict.fromkeys(overloads(names), write))


for _sign, _name in (("==", "eq"), ("!=", "ne"), ("<", "lt"), ("<=", "le"), (">", "gt"), (">=", "ge")):
    _comparison(f"{_name}.Tensor {_name}.Scalar", _sign)


@rule("logical_not.default")
def _logical_not(call: Call) -> str:
    return f"{call.operand('self', dtype_of(call.given['self']))} == 0"


def _logical(name: str, sign: str) -> None:
    def write(call: Call) -> str:
        return f"{call.operand('self', torch.bool)} {sign} {call.operand('other', torch.bool)}"

    RULES.update(dict.fromkeys(overloads(name), write))


def _bitwise(names: str, sign: str) -> None:
    def write(call: Call) -> str:
        return f"{call.operand('self')} {sign} {call.operand('other')}"

    RULES.update(dict.fromkeys(overloads(names), write))


_logical("logical_and.default", "&")
_logical("logical_or.default", "|")
_logical("logical_xor.default", "!=")
_bitwise("bitwise_and.Tensor bitwise_and.Scalar __and__.Tensor __and__.Scalar", "&")
_bitwise("bitwise_or.Tensor bitwise_or.Scalar __or__.Tensor __or__.Scalar", "|")
_bitwise("bitwise_xor.Tensor bitwise_xor.Scalar __xor__.Tensor __xor__.Scalar", "^")
_bitwise("bitwise_left_shift.Tensor bitwise_left_shift.Tensor_Scalar __lshift__.Scalar", "<<")
_bitwise("bitwise_right_shift.Tensor bitwise_right_shift.Tensor_Scalar __rshift__.Scalar", ">>")


@rule("bitwise_not.default")
def _bitwise_not(call: Call) -> str:
    x = call.operand("self")
    if call.dtype == torch.uint8:
        return f"{x} ^ {literal(255, torch.uint8)}"  # Triton's own mask is -1, which is no uint8
    return f"{x} == 0" if call.dtype == torch.bool else f"~{x}"


@rule("_to_copy.default to.dtype to.dtype_layout to.device to.other type_as.default")
def _cast(call: Call) -> str:
    source = call.given["self"]
    if source.meta["val"].device != call.node.meta["val"].device:
        raise Unsupported("it copies between devices")
    return rounded(call.operand("self", dtype_of(source)), compute_dtype(dtype_of(source)), call.dtype)


@rule("silu_backward.default sigmoid_backward.default tanh_backward.default threshold_backward.default")
def _backward(call: Call) -> str:
    name = call.node.target._opname  # type: ignore[union-attr]
    operands = {n: call.operand(n) for n, value in call.given.items() if isinstance(value, torch.fx.Node)}
    if name == "threshold_backward":
        limit = literal(call.number("threshold"), compute_dtype(call.dtype))
        return f"tl.where({operands['self']} <= {limit}, 0.0, {operands['grad_output']})"
    return formulas.BACKWARD[name](*operands.values())


def _glu(call: Call) -> str:
    gate = call.operand("gate", dtype_of(call.given["gate"]))
    source = compute_dtype(dtype_of(call.given["gate"]))
    activated = formulas.ACTIVATIONS[call.given["activation"]](gate, source)
    return f"{cast(f'({activated})', source, compute_dtype(call.dtype))} * {call.operand('up')}"


RULES[glu.overload] = _glu
