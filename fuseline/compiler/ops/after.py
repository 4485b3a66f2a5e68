"""fuseline::after: an order between two values that code generation has to keep."""

from __future__ import annotations

import torch

from ._define import Kind, op


@op("after(Tensor(a!) x, Tensor y) -> ()", kind=Kind.OTHER)
def after(x: torch.Tensor, y: torch.Tensor) -> None:
    """Nothing is done: what reads x from here on is scheduled after what makes y, as if x changed here."""


@after.fake
def _(x: torch.Tensor, y: torch.Tensor) -> None:
    return None
