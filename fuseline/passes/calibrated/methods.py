"""How codes are chosen."""

from __future__ import annotations

import enum


class Method(enum.Enum):
    """See the page of `quantize`."""

    RTN = "rtn"  # to nearest
    HQQ = "hqq"  # ranges by half-quadratic splitting
    GPTQ = "gptq"  # columns make up for what those before them lost
    AWQ = "awq"  # channels scaled by what they are multiplied with, the exponent searched
    SMOOTH = "smooth"  # channels scaled, so that activations are easier to round


CALIBRATED = (Method.GPTQ, Method.AWQ, Method.SMOOTH)
"""Those that decide from data."""
