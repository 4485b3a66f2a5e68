"""`fuseline.decode` in kernels: one element at a time, of codes in bytes or packed as their format packs a row."""

from __future__ import annotations

import torch

from ..compiler.formats import FORMATS, Element
from ..compiler.formats.floating import Float
from ..compiler.formats.midrise import MidRise
from ..compiler.formats.ternary import DIGITS, Binary, Ternary
from ..compiler.traits import arguments
from .call import Unsupported, dtype_of
from .dtypes import literal, rounded
from .indexing import split
from .rows import element
from .sizes import same, shape
from .tile import Tile
from .values import ZERO, Index, Mask, Term

_F = torch.float32
_NAN = 'float("nan")'


def rule(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """(number of the code − zero)·scale, in float32; what lies beyond the dtype saturates."""
    given, name = arguments(node), node.name
    scale, zero, outer, group = (given[k] for k in ("scale", "zero", "outer", "group"))
    if dtype_of(scale) == torch.float64:
        raise Unsupported("scales in float64")
    form = FORMATS[given["format"]]
    code = _code(tile, node, form.of(zero is None), index, mask)
    value = _number(tile, name, code, form.of(zero is None))
    which = split(tile, index[-1], group)[0] if not same(shape(scale)[-1], 1) else ZERO
    at = (*index[:-1], which)
    if zero is not None:
        point = element(tile, zero, at, mask, _F)
        value = tile.bind(f"{name}_above", f"{value.text} - {point.text}", value.axes | point.axes)
    factor = _scale(tile, name, scale, at, mask)
    if outer is not None:
        whole = element(tile, outer, tuple(ZERO for _ in shape(outer)), mask, _F)
        factor = tile.bind(f"{name}_factor", f"{factor.text} * {whole.text}", factor.axes | whole.axes)
    axes = value.axes | factor.axes
    scaled = tile.bind(f"{name}_value", f"{value.text} * {factor.text}", axes).text
    most = literal(min(torch.finfo(given["dtype"]).max, torch.finfo(_F).max), _F)
    text = f"tl.where({scaled} > {most}, {most}, tl.where({scaled} < -({most}), -({most}), {scaled}))"
    bounded = tile.bind(f"{name}_bounded", text, axes)
    if given["dtype"] == torch.float64:
        return tile.bind(name, f"{bounded.text}.to(tl.float64)", axes)
    text = rounded(bounded.text, _F, given["dtype"])
    return bounded if text == bounded.text else tile.bind(name, text, axes)


def _bytes(tile: Tile, codes: torch.fx.Node, index: Index, mask: Mask) -> Term:
    tile.read_as_bytes.add(codes)
    byte = tile.value(codes, index, mask)
    return tile.bind("byte", f"{byte.text}.to(tl.int32)", byte.axes)


def _code(tile: Tile, node: torch.fx.Node, form: Element, index: Index, mask: Mask) -> Term:
    """A code as int32."""
    given = arguments(node)
    codes, bits = given["codes"], form.bits
    if not given["packed"] or bits == 8:
        return _bytes(tile, codes, index, mask)
    lead, column = index[:-1], index[-1]
    if isinstance(form, Ternary):
        at = tile.bind("at", f"{column.text} // {DIGITS}", column.axes)
        byte = _bytes(tile, codes, (*lead, at), mask)
        digit = tile.bind("digit", f"{column.text} % {DIGITS}", column.axes).text
        power = "81"
        for k in reversed(range(DIGITS - 1)):
            power = f"tl.where({digit} == {k}, {3**k}, {power})"
        return tile.bind("code", f"{byte.text} // ({power}) % 3", byte.axes | column.axes)
    first = tile.bind("first", f"{column.text} * {bits}", column.axes)
    at = tile.bind("at", f"{first.text} // 8", column.axes)
    byte = _bytes(tile, codes, (*lead, at), mask)
    word, axes = byte.text, byte.axes | column.axes
    if 8 % bits:  # it may go on in the next byte
        last = shape(codes)[-1]
        after = tile.bind("after", f"tl.minimum({at.text} + 1, {tile.size(last)} - 1)", column.axes)
        word = f"({word} | ({_bytes(tile, codes, (*lead, after), mask).text} << 8))"
    return tile.bind("code", f"({word} >> ({first.text} % 8)) & {2**bits - 1}", axes)


def _number(tile: Tile, name: str, code: Term, form: Element) -> Term:
    """What a code stands for before its scale, as float32."""
    if isinstance(form, Binary):
        text = f"({code.text} * 2 - 1).to(tl.float32)"
    elif isinstance(form, Ternary):
        text = f"({code.text} - 1).to(tl.float32)"
    elif isinstance(form, Float):
        low, sign = 2 ** (form.bits - 1) - 1, 2 ** (form.bits - 1)
        bits = f"(({code.text} & {low}) << {23 - form.mantissa}) | (({code.text} & {sign}) << {32 - form.bits})"
        number = tile.bind(f"{name}_bits", f"({bits}).to(tl.float32, bitcast=True)", code.axes).text
        text = f"{number} * {literal(2.0 ** (127 - form.bias), _F)}"
        if form.name == "e4m3":
            text = f"tl.where(({code.text} & 127) == 127, {_NAN}, {text})"
        elif form.name == "e5m2":
            beyond = f"tl.where(({code.text} & 3) == 0, {number} * {_INFINITE}, {_NAN})"
            text = f"tl.where(({code.text} & 124) == 124, {beyond}, {text})"
    elif isinstance(form, MidRise):
        text = f"{code.text}.to(tl.float32) - {literal(form.top, _F)}"
    else:
        offset = 2 ** (form.bits - 1) if form.symmetric and form.bits < 8 else 0
        text = f"({code.text} - {offset}).to(tl.float32)"
    return tile.bind(f"{name}_number", text, code.axes)


_INFINITE = 'float("inf")'


def _scale(tile: Tile, name: str, scale: torch.fx.Node, at: Index, mask: Mask) -> Term:
    """Stored scales as numbers."""
    dtype = dtype_of(scale)
    if dtype not in (torch.uint8, torch.float8_e4m3fn):
        return element(tile, scale, at, mask, _F)
    stored = _bytes(tile, scale, at, mask)
    if dtype == torch.float8_e4m3fn:
        return _number(tile, f"{name}_scale", stored, Float(4, 3))
    power = f"({stored.text} << 23).to(tl.float32, bitcast=True)"
    power = f"tl.where({stored.text} == 0, {literal(2.0**-127, _F)}, {power})"
    return tile.bind(f"{name}_scale", f"tl.where({stored.text} == 255, {_NAN}, {power})", stored.axes)
