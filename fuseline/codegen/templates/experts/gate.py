"""The gated unit in kernels: activation(gate)·up, in float32."""

from __future__ import annotations

import torch

from ....compiler.ops.moe import CLAMPED
from ...formulas import ACTIVATIONS, quotient
from ..text import Text
from .read import Experts


def gated(text: Text, experts: Experts) -> None:
    """Defines `inner` of `gate` and `up`."""
    given = experts.given
    if given["activation"] != CLAMPED:
        text.add(f"inner = {ACTIVATIONS[given['activation']]('gate', torch.float32)} * up")
        return
    alpha, limit = float(given["alpha"]), float(given["limit"])
    unit = quotient("gate", f"(1 + tl.exp({-alpha!r} * gate))", torch.float32)
    text.add(
        f"gate = tl.where(gate > {limit!r}, {limit!r}, gate)",
        f"up = tl.where(up > {limit!r}, {limit!r}, tl.where(up < {-limit!r}, {-limit!r}, up))",
        f"inner = (up + 1) * ({unit})",
    )
