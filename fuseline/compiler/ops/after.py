"""fuseline::after: an order between values that code generation has to keep."""

from __future__ import annotations

import torch

from ._define import Kind, op


@op("after(Tensor(a!) x, Tensor[] others) -> ()", kind=Kind.OTHER)
def after(x: torch.Tensor, others: list[torch.Tensor]) -> None:
    """Nothing is done: what reads x from here on is scheduled after what makes the others, as if x changed here."""


@after.fake
def _(x: torch.Tensor, others: list[torch.Tensor]) -> None:
    return None
