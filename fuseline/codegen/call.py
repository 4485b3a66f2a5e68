"""One pointwise node to be written as an expression: its arguments, its operands' text, its result's dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .dtypes import cast, compute_dtype, literal


class Unsupported(Exception):
    """Raised by a rule that cannot write its node; the message is the reason given to the user."""


@dataclass(frozen=True)
class Call:
    """One node to be written: its arguments by name, the text of its operands, and its result's dtype."""

    node: torch.fx.Node
    given: Mapping[str, Any]
    operands: Mapping[torch.fx.Node, str]
    dtype: torch.dtype

    def operand(self, name: str, dtype: torch.dtype | None = None) -> str:
        """The argument `name` as an expression of the compute type of `dtype` (of the result, when not given)."""
        target = compute_dtype(dtype or self.dtype)
        value = self.given[name]
        if isinstance(value, torch.fx.Node):
            if value not in self.operands:
                raise Unsupported(f"{value.name} is not available in the kernel")
            return cast(self.operands[value], compute_dtype(dtype_of(value)), target)
        if isinstance(value, (bool, int, float)):
            return literal(value, target)
        raise Unsupported(f"argument {name}={value!r} is not a tensor or a number")

    def number(self, name: str) -> float | int:
        """The argument `name`, which must be a Python number."""
        value = self.given[name]
        if isinstance(value, (bool, int, float)):
            return value
        raise Unsupported(f"argument {name}={value!r} is not a constant number")

    def promoted(self, *names: str) -> torch.dtype:
        """The dtype in which PyTorch would compare or combine these arguments."""
        values = [_sample(self.given[name]) for name in names]
        return torch.result_type(values[0], values[1])


def dtype_of(node: torch.fx.Node) -> torch.dtype:
    """The dtype of a node's value; int64 for a SymInt, float64 for a SymFloat."""
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return value.dtype
    if isinstance(value, (bool, torch.SymBool)):
        return torch.bool
    return torch.int64 if isinstance(value, (int, torch.SymInt)) else torch.float64


def _sample(value: Any) -> Any:
    """Something `torch.result_type` takes for an argument."""
    if isinstance(value, torch.fx.Node):
        value = value.meta["val"]
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return 1
    return 1.0 if isinstance(value, (float, torch.SymFloat)) else value
