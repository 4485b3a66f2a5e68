"""`bits=auto:BUDGET`: how many bytes weights may take, and the formats to choose from.

auto:40MB       bytes of the codes, scales and zero points of the sites that are rounded; also KB, GB, MiB, …
auto:0.3x       the share of the bytes that those weights have now
auto:4.25bits   bits a weight on average, scales and zero points included
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...compiler.errors import UserError
from ...compiler.formats import FORMATS
from ...compiler.schemes import Scheme

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
LADDER = ("int8", "int6", "int5", "int4", "int3", "int2")
"""What is chosen from unless `among` says something else, at the granularity of `weights`."""


@dataclass(frozen=True)
class Budget:
    """amount: bytes, a share, or bits, as `unit` says: "bytes", "x" or "bits"."""

    amount: float
    unit: str

    @staticmethod
    def parse(text: str) -> Budget:
        """Reads `auto:40MB`, `auto:0.3x` or `auto:4bits`.

        Raises:
            UserError: it is none of these, or nothing at all.
        """
        found = re.fullmatch(r"auto:(\d+(?:\.\d+)?)(x|bits?|[KMG]i?B|B|)", text)
        if found is None or float(found[1]) == 0:
            raise UserError(
                f"bits='{text}' is no budget", remedy="bits=auto:40MB, bits=auto:0.3x or bits=auto:4.25bits"
            )
        number, unit = float(found[1]), found[2]
        if unit in UNITS:
            return Budget(number * UNITS[unit], "bytes")
        return Budget(number, "x" if unit == "x" else "bits")

    def bytes(self, weights: int, stored: int) -> float:
        """The budget in bytes, for so many weights that take so many bytes now."""
        return {"bytes": 1, "x": stored, "bits": weights / 8}[self.unit] * self.amount


def ladder(weights: Scheme, among: Sequence[str]) -> tuple[Scheme, ...]:
    """The schemes to choose from, each once: those of `among`, or the integers at the granularity of `weights`."""
    if among:
        found = [Scheme.parse(text, weights=True) for text in among]
    elif weights.of.affine:
        found = [replace(weights, format=name) for name in LADDER]
    else:
        found = [weights, *(replace(weights, format=n, group=weights.group) for n in _floats(weights))]
    return tuple(dict.fromkeys(found))


def _floats(weights: Scheme) -> list[str]:
    """Real-scaled floating-point formats of all widths, where `weights` is one of them."""
    if weights.of.scaling != "real" or weights.format in ("ternary", "binary"):
        raise UserError(f"'{weights}' has no other widths to choose from", remedy="say them: among=mxfp8|mxfp6|mxfp4")
    return [name for name in ("e4m3", "e3m2", "e2m2", "e2m1") if name in FORMATS]
