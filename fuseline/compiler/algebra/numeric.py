"""Both sides of a region on random numbers, in float64: what the algebra says, computed.

Leaves and parameters are drawn afresh, in the sizes of the program (symbolic ones as they were at capture). Casts to
floating-point types are to float64, so that the sides differ by rounding alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import Node

from ..compat import real_tensors, size_hint
from ..expressions import Expression, HadamardCore
from ..precision import error
from ..program import Program
from .region import EMPTY, Region, Side, is_zero, operands

BOUND = 1e-12
"""Of max|Δ|/max|before|."""
DENSITIES = (0.8, 0.02)
"""Share of the true elements of a mask; some ops take few."""


def difference(region: Region, program: Program, seed: int = 0) -> float:
    """max|after − before| / max|before| on random numbers."""
    *several, last = DENSITIES
    for density in several:
        try:
            return _difference(region, program, seed, density)
        except RuntimeError:
            continue
    return _difference(region, program, seed, last)


def _difference(region: Region, program: Program, seed: int, density: float) -> float:
    with real_tensors(), torch.no_grad():
        draw = torch.Generator().manual_seed(seed)
        known = {leaf: _leaf(leaf, region, draw, density) for leaf in region.leaves}
        sources = {n: program.sources[n].tensor for w in region.weights for n in w.meta["weight"].parameters()}
        drawn = {name: _drawn(tuple(t.shape), t.dtype, draw) for name, t in sources.items()}
        memo: dict[Expression, Any] = {}
        known |= {w: _promoted(w.meta["weight"]).evaluate(drawn.__getitem__, memo) for w in region.weights}
        before, after = (_run(side, known) for side in region.sides)
    return error(after, before) if before.isfinite().any() else float("inf")


def _run(side: Side, known: dict[Node, Any]) -> Any:
    values = dict(known)
    last = {n: i for i, d in enumerate(side.inner.values()) for n in operands(d)}
    for i, (node, definition) in enumerate(side.inner.items()):
        args, kwargs = torch.fx.node.map_arg(definition, values.__getitem__)
        args, kwargs = torch.utils._pytree.tree_map(_wide, (args, kwargs))
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if getattr(node.target, "_opname", "") in EMPTY:
            values[node].zero_()  # any values, but the same on both sides
        for used in operands(definition):
            if last[used] == i and used is not side.root:
                values.pop(used, None)
    return values[side.root]


def _leaf(leaf: Node, region: Region, draw: torch.Generator, density: float) -> Any:
    value = leaf.meta["val"]
    if isinstance(value, (tuple, list)):
        return type(value)(_of_type(v, None, draw, density) for v in value)
    if is_zero(leaf):
        return torch.zeros(_sizes(value), dtype=torch.float64)
    return _of_type(value, _bound(leaf, region), draw, density)


def _of_type(value: Any, bound: int | None, draw: torch.Generator, density: float) -> Any:
    if not isinstance(value, torch.Tensor):
        return size_hint(value) if isinstance(value, torch.SymInt) else value
    shape = _sizes(value)
    if bound is None or value.is_floating_point() or value.dtype is torch.bool:
        return _drawn(shape, value.dtype, draw, density)
    return torch.randint(0, bound, shape, generator=draw, dtype=value.dtype).sort(-1).values


def _drawn(shape: tuple[int, ...], dtype: torch.dtype, draw: torch.Generator, density: float = 1.0) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=torch.float64, generator=draw)
    if dtype is torch.bool:
        return torch.rand(shape, generator=draw) < density
    return torch.randint(0, 2, shape, generator=draw, dtype=dtype)


def _sizes(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(size_hint(s) for s in value.shape)


def _bound(leaf: Node, region: Region) -> int | None:
    """Below which the numbers of an integer leaf stay: the sizes that they count, wherever it is read."""
    found: list[int] = []
    for side in region.sides:
        for node, (args, _) in side.inner.items():
            if leaf in operands((args, {})):
                found += [s for a in operands((args, {})) if a is not leaf for s in _counted(node, a)]
    return min(found, default=None)


def _counted(node: Node, operand: Node) -> tuple[int, ...]:
    value = operand.meta.get("val")
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.dim():
        return ()
    if getattr(node.target, "_opname", "") == "embedding":
        return (size_hint(value.shape[0]),)
    return tuple(size_hint(s) for s in value.shape[:-1])


def _promoted(e: Expression) -> Expression:
    """The same expression with its floating-point types wide, on the CPU."""
    if isinstance(e, HadamardCore):
        return dataclasses.replace(e, device="cpu")
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(e):
        value = getattr(e, field.name)
        if isinstance(value, Expression):
            changes[field.name] = _promoted(value)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(_promoted(v) if isinstance(v, Expression) else v for v in value)
        else:
            changes[field.name] = "cpu" if field.name == "device" else _wide(value)
    return dataclasses.replace(e, **changes)


def _wide(value: Any) -> Any:
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(value, torch.device) else value
