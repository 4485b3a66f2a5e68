"""Stored scales as float32 numbers, as kernel text."""

from __future__ import annotations

from ..text import Text

_NAN = 'float("nan")'


def number(text: Text, name: str, loaded: str, scaling: str) -> str:
    """An expression of the scales that `loaded` reads; name: of a variable that this may define before.

    scaling: `real`, `e8m0` (2^(byte − 127)) or `e4m3` (its byte). What is not a number there is none in float32.
    """
    if scaling == "real":
        return f"{loaded}.to(tl.float32)"
    text.add(f"{name} = {loaded}.to(tl.int32)")
    if scaling == "e8m0":
        normal = f"({name} << 23).to(tl.float32, bitcast=True)"
        return f"tl.where({name} == 255, {_NAN}, tl.where({name} == 0, {2.0**-127!r}, {normal}))"
    bits = f"((({name} & 127) << 20) | (({name} & 128) << 24))"  # exponents are 120 too small
    return f"tl.where(({name} & 127) == 127, {_NAN}, {bits}.to(tl.float32, bitcast=True) * {2.0**120!r})"
