"""A family's program in double precision throughout: what the model itself casts to float32 is promoted too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import fuseline
from fuseline.compiler.program import Program

from .rows import Row


class Promoted(TorchFunctionMode):
    """Whatever names float32, names float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = lambda x: torch.float64 if x is torch.float32 else x
        args, kwargs = tree_map(wide, (args, kwargs or {}))
        return function(*args, **kwargs) if function is not torch.Tensor.float else args[0].double()


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Tensors that are made without a dtype, and quotients of integers, have this one."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


@torch.no_grad()
def captured(row: Row, dtype: torch.dtype = torch.float32) -> Program:
    """A row's program at its own precision, or, for float64, in double precision throughout.

    Raises:
        UserError: the model cannot be captured as one graph.
    """
    model, given = row.model(), dict(row.inputs(2, 1))
    if dtype is torch.float32:
        return fuseline.capture(model, (), given)
    given = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, given)
    with precision(torch.float64), Promoted():
        return fuseline.capture(model.double(), (), given)
