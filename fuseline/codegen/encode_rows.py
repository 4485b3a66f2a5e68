"""`fuseline.encode` in kernels: codes and scales of any format with one level of scales.

x / scale is rounded to the format's numbers by arithmetic on its exponent: with M bits of mantissa, numbers between
2^e and 2^(e+1) lie 2^(e−M) apart, subnormal ones as those of the least exponent.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..compiler import products
from ..compiler.formats import FORMATS, Integer
from ..compiler.formats.floating import Float
from ..compiler.formats.scales import halfway
from ..compiler.formats.ternary import Binary, Ternary
from ..compiler.ops import encode
from ..compiler.traits import arguments
from .call import Unsupported
from .dtypes import literal
from .formulas import divide, round_half_even
from .quantize_rows import group_of_channel, over_group
from .rows import Rule, element
from .tile import Tile
from .values import Index, Mask, Term

_F = torch.float32
_NAN = 'float("nan")'


def _scale(tile: Tile, node: torch.fx.Node, lead: Index, group: Term, mask: Mask) -> Term:
    """A group's scale; NaN where an element is none or infinite."""
    reason = products.refuse_rows(node)
    if reason:
        raise Unsupported(reason)
    form = FORMATS[arguments(node)["format"]]
    mean = isinstance(form.element, (Ternary, Binary))
    reach = over_group(tile, node, lead, group, mask, "mean" if mean else "magnitude")
    spoilt = over_group(tile, node, lead, group, mask, "spoilt")
    axes, name = reach.axes | spoilt.axes, node.name
    if form.scaling == "e8m0":
        scale = _power_of_two(tile, name, reach, form.element.top)
    else:
        quotient = tile.bind(f"{name}_quotient", divide(reach.text, literal(form.element.top, _F), _F), reach.axes)
        most = literal(torch.finfo(_F).max, _F)
        scale = tile.bind(f"{name}_bounded", f"tl.where({quotient.text} > {most}, {most}, {quotient.text})", reach.axes)
    none = literal(0 if isinstance(form.element, Binary) else 1, _F)
    least = scale.text if not isinstance(form.element, Binary) else reach.text
    text = f"tl.where({least} == 0, {none}, {scale.text})"
    return tile.bind(f"{name}_scale", f"tl.where({spoilt.text} == 0, {text}, {_NAN})", axes)


def _power_of_two(tile: Tile, name: str, reach: Term, top: float) -> Term:
    """As `formats/scales.py` has it: from 2^−127 to 2^127, 1 for 0. Subnormal numbers are lifted."""
    tiny = tile.bind(f"{name}_tiny", f"{reach.text} < {literal(2.0**-126, _F)}", reach.axes).text
    lifted = f"tl.where({tiny}, {reach.text} * {literal(2.0**64, _F)}, {reach.text})"
    bits = tile.bind(f"{name}_bits", f"({lifted}).to(tl.int32, bitcast=True)", reach.axes).text
    shift = math.frexp(top)[1] - 1
    carry = round(2 * (1 - halfway(top)) * 2**23)  # into the exponent, from half-way on
    exponent = f"(({bits} + {carry} >> 23) - tl.where({tiny}, {127 + 64 + shift}, {127 + shift}))"
    exponent = tile.bind(f"{name}_exponent", exponent, reach.axes).text
    exponent = tile.bind(f"{name}_bounded", f"tl.minimum(tl.maximum({exponent}, -127), 127)", reach.axes).text
    power = f"(({exponent} + 127) << 23).to(tl.float32, bitcast=True)"
    power = f"tl.where({exponent} == -127, {literal(2.0**-127, _F)}, {power})"
    return tile.bind(f"{name}_power", f"tl.where({reach.text} == 0, {literal(1, _F)}, {power})", reach.axes)


def _codes(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    scale = _scale(tile, node, index[:-1], group_of_channel(tile, node, index), mask)
    x = element(tile, arguments(node)["x"], index, mask, _F)
    axes, name = x.axes | scale.axes, node.name
    ratio = tile.bind(f"{name}_ratio", divide(x.text, scale.text, _F), axes).text
    form = FORMATS[arguments(node)["format"]].element
    if isinstance(form, Binary):
        text = f"tl.where({ratio} < 0, 0, 1)"
    elif isinstance(form, Float):
        text = _float_code(tile, name, ratio, axes, form)
    else:
        assert isinstance(form, (Integer, Ternary))
        low, high = form.ends if isinstance(form, Integer) else (-1, 1)
        offset = 1 if isinstance(form, Ternary) else 0 if form.bits == 8 else 2 ** (form.bits - 1)
        down = tile.bind(f"{name}_floor", f"tl.floor({ratio})", axes)
        whole = tile.bind(f"{name}_rounded", round_half_even(ratio, _F, down.text), axes).text
        least, most = literal(low, _F), literal(high, _F)
        bounded = f"tl.where({whole} < {least}, {least}, tl.where({whole} > {most}, {most}, {whole}))"
        bounded = tile.bind(f"{name}_bounded", bounded, axes).text
        text = f"tl.where({ratio} == {ratio}, {bounded}, 0.0).to(tl.int32) + {offset}"
    kind = "tl.int8" if form.stored == torch.int8 else "tl.uint8"
    return tile.bind(f"{name}_codes", f"({text}).to({kind})", axes)


def _float_code(tile: Tile, name: str, ratio: str, axes: frozenset[str], form: Float) -> str:
    """The code of the number nearest to `ratio`, as int32."""
    top, least, m = literal(form.top, _F), 1 - form.bias, form.mantissa
    bits = tile.bind(f"{name}_bits", f"{ratio}.to(tl.int32, bitcast=True)", axes).text
    size = f"tl.where(tl.abs({ratio}) > {top}, {top}, tl.abs({ratio}))"
    size = tile.bind(f"{name}_size", f"tl.where({ratio} == {ratio}, {size}, 0.0)", axes).text
    exponent = f"tl.maximum(({size}.to(tl.int32, bitcast=True) >> 23) - 127, {least})"
    exponent = tile.bind(f"{name}_exponent", exponent, axes).text
    step = f"({m + 127} - {exponent} << 23).to(tl.float32, bitcast=True)"  # its inverse
    steps = tile.bind(f"{name}_steps", f"{size} * {step}", axes).text
    if m:
        down = tile.bind(f"{name}_floor", f"tl.floor({steps})", axes)
        whole = tile.bind(f"{name}_whole", round_half_even(steps, _F, down.text), axes).text
    else:  # the even code is not the even number of steps: up from a half where the code below is odd
        odd = f"((({exponent} + {form.bias}) & 1) == 1)"
        up = f"tl.where({steps} >= 1.0, ({steps} > 1.5) | (({steps} == 1.5) & {odd}), {steps} > 0.5)"
        whole = tile.bind(f"{name}_whole", f"tl.where({steps} >= 1.0, 1.0, 0.0) + ({up}).to(tl.float32)", axes).text
    code = f"(({exponent} + {form.bias}) << {m}) + {whole}.to(tl.int32) - {2**m}"
    sign = f"tl.where({ratio} == {ratio}, ({bits} >> 31) & 1, 0)"
    return f"({code}) + ({sign} << {form.bits - 1})"


def _scales(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    return _scale(tile, node, index[:-1], index[-1], mask)


RESULTS: dict[Any, tuple[Rule, ...]] = {encode.overload: (_codes, _scales)}
