"""Sizes of Hadamard transforms, with the operands that the op takes for them."""

from __future__ import annotations

import torch

from fuseline.codegen.kernel import Launcher
from fuseline.compiler.expressions import online_core
from fuseline.compiler.ops import hadamard
from tests.codegen.regions import emitted

MODELS = (576, 1536, 4096, 8960, 11008, 14336, 18944)


def operands(n: int, dtype: torch.dtype, device: str = "cpu") -> tuple[list[torch.Tensor], bool]:
    """The core of n, where it has one, and the argument `signs`."""
    core, signs = online_core(n, dtype, device)
    return [] if core is None else [core.evaluate({}.__getitem__)], signs


def transform(n: int, signs: bool = False):
    """The op as a function of x and perhaps a core."""
    return lambda x, *core: hadamard(x, *(core or (None,)), n, signs)


def launcher(n: int, dtype: torch.dtype = torch.bfloat16) -> Launcher:
    """The transform of n channels alone, over a symbolic number of rows."""
    core, signs = operands(n, dtype)
    return emitted(transform(n, signs), torch.randn(3, n).to(dtype), *core, dynamic={0: (0,)})
