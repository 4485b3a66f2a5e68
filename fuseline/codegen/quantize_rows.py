"""Quantization of activations in kernels: one rule a result, `RESULTS[overload][result](tile, node, index, mask)`."""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.ops import quantize, quantize_affine
from ..compiler.traits import arguments
from . import nearest
from .call import Unsupported, dtype_of
from .dtypes import literal
from .formulas import divide, round_half_even
from .indexing import flatten, split
from .rows import Rule, as_number, element
from .sizes import Size, same, shape, size
from .tile import Tile
from .values import ZERO, Index, Mask, Term


def no_value(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    raise Unsupported("several tensors have no value of their own")


def domains(node: torch.fx.Node) -> tuple[tuple[Size, ...], ...]:
    """The shape over which rows are whole: groups."""
    whole = shape(arguments(node)["x"])
    return (whole if same(groups(node), 1) else (*whole[:-1], groups(node), group_length(node)),)


def _compute(node: torch.fx.Node) -> torch.dtype:
    return torch.promote_types(dtype_of(arguments(node)["x"]), torch.float32)


def group_length(node: torch.fx.Node) -> Size:
    """The group's length; a group as long as the row has the row's own size, which may be symbolic."""
    length, group = shape(arguments(node)["x"])[-1], arguments(node)["group"]
    return length if isinstance(group, torch.fx.Node) or same(length, group) else group


def groups(node: torch.fx.Node) -> Size:
    """How many groups a row has: what the shape of the scales says."""
    return size(node.meta["val"][1].shape[-1])


def over_group(tile: Tile, node: torch.fx.Node, lead: Index, group: Term, mask: Mask, what: str) -> Term:
    """The largest magnitude, the largest or the smallest element of one group of channels, or its mean magnitude.

    what: "magnitude", "high", "low", "mean"; or "spoilt": 0, and NaN where an element is not finite.
    """
    x, compute = arguments(node)["x"], _compute(node)
    texts = {"magnitude": "tl.abs({})", "spoilt": "{} * 0.0"}
    if what == "mean":
        texts["mean"] = divide("tl.abs({})", as_number(tile, group_length(node), compute), compute)

    def value(column: Term, inner: Mask) -> Term:
        channel = flatten(tile, (group, column), (groups(node), group_length(node)))
        term = element(tile, x, (*lead, channel), inner, compute)
        return tile.bind(f"{node.name}_{what}", texts.get(what, "{}").format(term.text), term.axes)

    how = {"low": "min", "mean": "sum", "spoilt": "sum"}.get(what, "max")
    return tile.reduce(f"{node.name}_{what}_of_all", how, group_length(node), (*lead, group), mask, compute, value)


def _step(tile: Tile, node: torch.fx.Node, span: Term, top: int) -> Term:
    """span / top; 1 for a group of zeros."""
    compute = _compute(node)
    least, one = literal(0, compute), literal(1, compute)
    text = f"tl.where({span.text} > {least}, {divide(span.text, literal(top, compute), compute)}, {one})"
    return tile.bind(f"{node.name}_scale", text, span.axes)


def _nearest(tile: Tile, name: str, x: Term, scale: Term, compute: torch.dtype) -> Term:
    axes = x.axes | scale.axes
    ratio = tile.bind(f"{name}_ratio", divide(x.text, scale.text, compute), axes)
    down = tile.bind(f"{name}_floor", f"tl.floor({ratio.text})", axes)
    return tile.bind(f"{name}_rounded", round_half_even(ratio.text, compute, down.text), axes)


def _clamped(text: str, low: int, high: int, compute: torch.dtype) -> str:
    least, most = literal(low, compute), literal(high, compute)
    return f"tl.where({text} < {least}, {least}, tl.where({text} > {most}, {most}, {text}))"


def group_of_channel(tile: Tile, node: torch.fx.Node, index: Index) -> Term:
    """The group that a channel lies in."""
    return ZERO if same(groups(node), 1) else split(tile, index[-1], group_length(node))[0]


def _top(node: torch.fx.Node) -> int:
    bits: int = arguments(node)["bits"]
    return 2 ** (bits - 1) - 1 if node.target is quantize.overload else 2**bits - 1


def _scale(tile: Tile, node: torch.fx.Node, lead: Index, group: Term, mask: Mask) -> Term:
    return _step(tile, node, over_group(tile, node, lead, group, mask, "magnitude"), _top(node))


def _codes(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    compute = _compute(node)
    scale = _scale(tile, node, index[:-1], group_of_channel(tile, node, index), mask)
    term = element(tile, arguments(node)["x"], index, mask, compute)
    code = nearest.code(tile, node.name, term, scale, compute)
    return tile.bind(f"{node.name}_codes", f"{code.text}.to(tl.int8)", code.axes)


def _low(tile: Tile, node: torch.fx.Node, lead: Index, group: Term, mask: Mask) -> Term:
    """The lower end of a group's range, 0 or below."""
    found, least = over_group(tile, node, lead, group, mask, "low"), literal(0, _compute(node))
    return tile.bind(f"{node.name}_least", f"tl.where({found.text} > {least}, {least}, {found.text})", found.axes)


def _affine_scale(tile: Tile, node: torch.fx.Node, lead: Index, group: Term, mask: Mask) -> Term:
    low, high = _low(tile, node, lead, group, mask), over_group(tile, node, lead, group, mask, "high")
    least, axes = literal(0, _compute(node)), low.axes | high.axes
    most = f"tl.where({high.text} < {least}, {least}, {high.text})"
    return _step(tile, node, tile.bind(f"{node.name}_span", f"{most} - {low.text}", axes), _top(node))


def _zero(tile: Tile, node: torch.fx.Node, lead: Index, group: Term, mask: Mask) -> Term:
    """The zero point as a number of the compute type."""
    compute = _compute(node)
    low, scale = _low(tile, node, lead, group, mask), _affine_scale(tile, node, lead, group, mask)
    up = tile.bind(f"{node.name}_up", f"-{low.text}", low.axes)
    nearest = _nearest(tile, f"{node.name}_zero", up, scale, compute)
    return tile.bind(f"{node.name}_zero", _clamped(nearest.text, 0, _top(node), compute), nearest.axes)


def _affine_codes(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    compute, group = _compute(node), group_of_channel(tile, node, index)
    scale = _affine_scale(tile, node, index[:-1], group, mask)
    zero = _zero(tile, node, index[:-1], group, mask)
    term = element(tile, arguments(node)["x"], index, mask, compute)
    nearest = _nearest(tile, node.name, term, scale, compute)
    shifted = tile.bind(f"{node.name}_shifted", f"{nearest.text} + {zero.text}", nearest.axes | zero.axes)
    text = f"{_clamped(shifted.text, 0, _top(node), compute)}.to(tl.uint8)"
    return tile.bind(f"{node.name}_codes", text, shifted.axes)


def _scales(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    return _scale(tile, node, index[:-1], index[-1], mask)


def _affine_scales(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    return _affine_scale(tile, node, index[:-1], index[-1], mask)


def _zeros(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    zero = _zero(tile, node, index[:-1], index[-1], mask)
    return tile.bind(f"{node.name}_zero_codes", f"{zero.text}.to(tl.uint8)", zero.axes)


RESULTS: dict[Any, tuple[Rule, ...]] = {
    quantize.overload: (_codes, _scales),
    quantize_affine.overload: (_affine_codes, _affine_scales, _zeros),
}
