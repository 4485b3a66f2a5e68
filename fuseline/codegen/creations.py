"""Ops that make a tensor from nothing: constants and ranges."""

from __future__ import annotations

from typing import Any

import torch

from ..compiler.traits import arguments, overloads
from .call import Unsupported, dtype_of
from .dtypes import cast, compute_dtype, literal, rounded, triton_type
from .rows import Rule
from .sizes import size
from .tile import Tile
from .values import Index, Mask, Term

RULES: dict[Any, Rule] = {}


def _scalar(tile: Tile, value: Any, dtype: torch.dtype) -> str:
    """A number, or a size known at run time, as a [1, 1] block of exactly the type `dtype`."""
    if isinstance(value, torch.fx.Node):
        if not isinstance(value.meta["val"], (int, torch.SymInt)):
            raise Unsupported(f"{value.name} is not a size")
        text = f"tl.full([1, 1], {tile.size(size(value.meta['val']))}, tl.int64)"
        return cast(text, torch.int64, dtype)
    return f"tl.full([1, 1], {literal(value, dtype)}, {triton_type(dtype)})"


def _constant(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    given, dtype = arguments(node), dtype_of(node)
    name = node.target._opname  # type: ignore[union-attr]
    default = 1 if name.startswith("ones") else 0
    value = given.get("fill_value", given.get("s", default))
    text = rounded(_scalar(tile, value, compute_dtype(dtype)), compute_dtype(dtype), dtype)
    return tile.bind(node.name, text)


def _range(tile: Tile, node: torch.fx.Node, index: Index, mask: Mask) -> Term:
    """start + step·k. PyTorch computes it in int64 or in float64 at most, then rounds."""
    given, dtype = arguments(node), dtype_of(node)
    compute = torch.int64 if not dtype.is_floating_point else compute_dtype(dtype)
    start, step = given.get("start", 0), given.get("step", 1)
    term = index[0]
    position = cast(f"tl.full((), {term.text}, tl.int64)" if term.text.isdigit() else f"{term.text}.to(tl.int64)",
                    torch.int64, compute)  # fmt: skip
    text = position if step == 1 else f"{_scalar(tile, step, compute)} * {position}"
    text = text if start == 0 else f"{_scalar(tile, start, compute)} + {text}"
    return tile.bind(node.name, rounded(f"({text})", compute, dtype), term.axes)


RULES.update(
    dict.fromkeys(
        overloads("""full.default full_like.default zeros.default zeros_like.default ones.default ones_like.default
                     scalar_tensor.default"""),
        _constant,
    )
)
RULES.update(dict.fromkeys(overloads("arange.default arange.start arange.start_step"), _range))
