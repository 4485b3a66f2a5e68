"""How far two values are apart: tensors, numbers, and tuples of them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils._pytree as pytree

from ..precision import clone, error


def deviation(actual: Any, reference: Any) -> float:
    """The largest error, max|Δ| / max|reference|, among a value's tensors and numbers; infinite if they don't fit."""
    if not fits(actual, reference):
        return math.inf
    worst = 0.0
    for a, r in zip(pytree.tree_leaves(actual), pytree.tree_leaves(reference), strict=True):
        if isinstance(a, torch.Tensor):
            worst = max(worst, _error(a, r))
        elif isinstance(a, (int, float)) and isinstance(r, (int, float)):
            worst = max(worst, abs(a - r) / (abs(r) or 1.0))
    return worst


def _error(a: torch.Tensor, r: torch.Tensor) -> float:
    """`precision.error`, by minima and maxima alone where everything is finite, which is most of the time."""
    if r.numel() and not (a.is_complex() or r.is_complex()):
        reference = r.detach().double()
        worst, largest = _largest(a.detach().double() - reference), _largest(reference)
        if math.isfinite(worst) and math.isfinite(largest):
            return worst / (largest or 1.0)
    return error(a, r)


def _largest(tensor: torch.Tensor) -> float:
    """The largest magnitude in a tensor that is not empty; NaN if there is one."""
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def fits(actual: Any, reference: Any) -> bool:
    """Whether two values have the same structure and shapes."""
    first, second = pytree.tree_leaves(actual), pytree.tree_leaves(reference)
    return len(first) == len(second) and all(
        getattr(a, "shape", None) == getattr(r, "shape", None) for a, r in zip(first, second, strict=True)
    )


def floating(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a value."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def is_finite(value: Any) -> bool:
    """Whether it has neither NaN nor infinity."""
    return all(math.isfinite(_largest(t)) for t in floating(value) if t.numel())


def last_place(value: Any) -> float:
    """The unit in the last place of a value's coarsest floating-point tensor, relative; 0 where there is none."""
    return max((torch.finfo(t.dtype).eps for t in floating(value)), default=0.0)


def types(value: Any) -> Any:
    """A value's dtypes, in its own structure."""
    return pytree.tree_map(lambda x: x.dtype if isinstance(x, torch.Tensor) else None, value)


def narrow(wide: Any, dtypes: Any) -> Any:
    """A value in these dtypes, which have its structure."""
    if isinstance(wide, (tuple, list)):
        return tuple(narrow(w, d) for w, d in zip(wide, dtypes, strict=True))
    if isinstance(wide, torch.Tensor) and isinstance(dtypes, torch.dtype):
        return wide.to(dtypes)
    return wide


def snapshot(value: Any) -> Any:
    """A copy that later writes don't reach."""
    return pytree.tree_map(clone, value)


def describe(value: Any) -> str:
    """`float32[1, 64, 576]`."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"({', '.join(map(describe, value))})" if isinstance(value, (tuple, list)) else type(value).__name__
