"""The dialect's row ops, and PyTorch's norms, in kernels: `RULES[overload](tile, node, index, mask)`.

The ops with several results (`quantize_rows.py`) are asked for through `RESULTS`, one rule a result.
"""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.ops import decode, dequantize, hadamard, layer_norm, rms_norm, rotary
from ..compiler.traits import arguments, is_last_dim_reduction
from . import decode_rows, encode_rows, quantize_rows
from .call import Unsupported, dtype_of
from .dtypes import cast, compute_dtype, literal, rounded
from .indexing import flatten, split
from .rows import Row, Rule, element
from .sizes import Size, same, shape
from .templates import hadamard as transform
from .tile import Tile
from .values import ZERO, Index, Mask, Term

RULES: dict[Any, Rule] = {}
RESULTS: dict[Any, tuple[Rule, ...]] = {}


def _affine(
    tile: Tile,
    node: torch.fx.Node,
    term: Term,
    column: Term,
    mask: Mask,
    compute: torch.dtype,
    unit_offset: bool = False,
) -> Term:
    """term·weight + bias, or term·(1 + weight), where the node has them."""
    given = arguments(node)
    weight, bias = given.get("weight"), given.get("bias")
    text, axes = term.text, term.axes
    if weight is not None:
        scale = element(tile, weight, (column,), mask, compute)
        text = f"{text} * (1 + {scale.text})" if unit_offset else f"{text} * {scale.text}"
        axes |= scale.axes
    if bias is not None:
        shift = element(tile, bias, (column,), mask, compute)
        text, axes = f"{text} + {shift.text}", axes | shift.axes
    return term if text == term.text else tile.bind(node.name, text, axes)


def _rms(tile: Tile, node: torch.fx.Node, x: torch.fx.Node, index: Index, mask: Mask, compute: torch.dtype) -> Term:
    """x·rsqrt(mean(x²) + eps) without the weight."""
    row = Row(tile, node.name, x, index[:-1], mask, compute)

    def squared(column: Term, inner: Mask) -> Term:
        term = row.at(column, inner)
        return tile.bind(f"{node.name}_squared", f"{term.text} * {term.text}", term.axes)

    eps = arguments(node)["eps"]
    if eps is None:
        if dtype_of(x) != compute:
            raise Unsupported("eps is left to PyTorch for a 16-bit input")
        eps = torch.finfo(compute).eps
    mean = row.mean("mean_square", squared)
    rstd = tile.bind(f"{node.name}_rstd", f"tl.rsqrt({mean.text} + {literal(eps, compute)})", mean.axes)
    term = row.at(index[-1], mask)
    return tile.bind(f"{node.name}_normed", f"{term.text} * {rstd.text}", term.axes | rstd.axes)


def _rms_norm(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    given = arguments(node)
    x, result = given["x"], compute_dtype(dtype_of(node))
    compute = compute_dtype(given["accumulate"] or dtype_of(x))
    term = _rms(tile, node, x, index, mask, compute)
    if given["cast_first"] and given["accumulate"] is not None and given["accumulate"] != dtype_of(x):
        text = rounded(term.text, compute, dtype_of(x))
        term, compute = tile.bind(f"{node.name}_rounded", text, term.axes), compute_dtype(dtype_of(x))
    if given["cast_first"] and result != compute:
        term, compute = tile.bind(f"{node.name}_wide", cast(term.text, compute, result), term.axes), result
    term = _affine(tile, node, term, index[-1], mask, compute, given["unit_offset"])
    return term if compute == result else tile.bind(node.name, cast(term.text, compute, result), term.axes)


def _aten_rms_norm(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    if not is_last_dim_reduction(node):
        raise Unsupported("it normalises over several dimensions")
    compute = compute_dtype(dtype_of(node))
    term = _rms(tile, node, arguments(node)["input"], index, mask, compute)
    return _affine(tile, node, term, index[-1], mask, compute)


def _layer_norm(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    given = arguments(node)
    if "normalized_shape" in given and not is_last_dim_reduction(node):
        raise Unsupported("it normalises over several dimensions")
    compute = compute_dtype(dtype_of(node))
    x = given["input"] if "input" in given else given["x"]
    row = Row(tile, node.name, x, index[:-1], mask, compute)
    mean = row.mean()
    variance = Row(tile, f"{node.name}_variance", x, index[:-1], mask, compute)
    spread = variance.mean("mean", row.squared_deviation(mean))
    rstd = tile.bind(f"{node.name}_rstd", f"tl.rsqrt({spread.text} + {literal(given['eps'], compute)})", spread.axes)
    term = row.at(index[-1], mask)
    axes = term.axes | mean.axes | rstd.axes
    normed = tile.bind(f"{node.name}_normed", f"({term.text} - {mean.text}) * {rstd.text}", axes)
    return _affine(tile, node, normed, index[-1], mask, compute)


def _rotary(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """x·cos + [−x₂, x₁]·sin: the partner half is the same expression at another column."""
    given = arguments(node)
    x, compute = given["x"], compute_dtype(dtype_of(node))
    width = shape(node)[-1]
    if not isinstance(width, int) or width % 2 or not same(shape(x)[-1], width):
        raise Unsupported(f"rotary over {width} channels")
    column, half = index[-1], width // 2
    first = tile.bind("first", f"{column.text} < {half}", column.axes)
    partner = tile.bind(
        "partner", f"tl.where({first.text}, {column.text} + {half}, {column.text} - {half})", column.axes
    )  # fmt: skip

    def operand(name: str, at: Term) -> Term:
        source = given[name]
        rank = source.meta["val"].dim()
        return element(tile, source, (*index[:-1], at)[len(index) - rank :], mask, compute)

    here, there = operand("x", column), operand("x", partner)
    cos, sin = operand("cos", column), operand("sin", column)
    turned = f"tl.where({first.text}, -{there.text}, {there.text})"
    axes = here.axes | there.axes | cos.axes | sin.axes | column.axes
    return tile.bind(node.name, f"{here.text} * {cos.text} + {turned} * {sin.text}", axes)


def _dequantize(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """(codes − zero)·scale. Four-bit codes lie as `fuseline.dequantize` says: low nibbles first in each group."""
    given = arguments(node)
    codes, scale, zero, bits, group = (given[k] for k in ("codes", "scale", "zero", "bits", "group"))
    compute = torch.promote_types(dtype_of(scale), torch.float32)
    if bits not in (4, 8):
        raise Unsupported(f"codes of {bits} bits")
    length = shape(node)[-1]
    lead, groups = index[:-1], length // group
    which, within = split(tile, index[-1], group) if not same(groups, 1) else (ZERO, index[-1])
    if bits == 4:
        half = group // 2
        upper = tile.bind("upper", f"{_typed(within)} >= {half}", within.axes)
        byte = tile.bind("byte", f"tl.where({upper.text}, {within.text} - {half}, {within.text})", within.axes)
        position = flatten(tile, (which, byte), (groups, half))
        pair = tile.value(codes, (*lead, position), mask)
        axes = pair.axes | upper.axes
        text = f"tl.where({upper.text}, {pair.text} >> 4, {pair.text} & 15)"
        code = tile.bind(f"{node.name}_code", f"({text}).to(tl.float32)", axes)
        code = Term(cast(code.text, torch.float32, compute), axes)
    else:
        code = element(tile, codes, index, mask, compute)
    centred, axes = code.text, code.axes
    if zero is not None:
        term = element(tile, zero, (*lead, which), mask, compute)
        centred, axes = f"({centred} - {term.text})", axes | term.axes
    elif bits == 4:
        centred = f"({centred} - 8)"
    factor = element(tile, scale, (*lead, which), mask, compute)
    value = tile.bind(f"{node.name}_value", f"{centred} * {factor.text}", axes | factor.axes)
    text = rounded(value.text, compute, given["dtype"])
    return value if text == value.text else tile.bind(node.name, text, value.axes)


def _typed(term: Term) -> str:
    return f"tl.full((), {term.text}, tl.int32)" if term.text.isdigit() else term.text


def domains(node: torch.fx.Node) -> tuple[tuple[Size, ...], ...]:
    """Shapes over which the op's rows are whole: the groups of a quantization, otherwise the rows of its input."""
    x = node.args[0]
    assert isinstance(x, torch.fx.Node)
    if node.target is hadamard.overload:
        return transform.domains(node)
    if node.target in RESULTS:
        return quantize_rows.domains(node)
    return (shape(x),)


RULES[rms_norm.overload] = _rms_norm
RULES[layer_norm.overload] = _layer_norm
RULES[torch.ops.aten.rms_norm.default] = _aten_rms_norm
RULES[torch.ops.aten.layer_norm.default] = _layer_norm
RULES[rotary.overload] = _rotary
RULES[dequantize.overload] = _dequantize
RULES[hadamard.overload] = transform.rule
RULES[decode.overload] = decode_rows.rule
RESULTS.update(quantize_rows.RESULTS | encode_rows.RESULTS)
RULES.update(dict.fromkeys(RESULTS, quantize_rows.no_value))
