"""A program in the next higher precision, and how far its results are from that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Interpreter

from .program import Program

NARROW = (torch.float16, torch.bfloat16)


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max|actual − reference| / max|reference|; infinite where either is NaN alone."""
    if reference.numel() == 0:
        return 0.0
    a, r = actual.detach().double(), reference.detach().double()
    same = (a == r) | (a.isnan() & r.isnan())
    delta = torch.where(same, torch.zeros_like(r), (a - r).abs())
    largest = r[r.isfinite()].abs().max().item() if r.isfinite().any() else 0.0
    worst = delta.max().item()
    return float("inf") if worst != worst else worst / (largest or 1.0)


def floats(outputs: Any) -> list[torch.Tensor]:
    """The floating-point tensors among a program's outputs."""
    flat = torch.utils._pytree.tree_leaves(outputs)
    return [o for o in flat if isinstance(o, torch.Tensor) and o.is_floating_point()]


def promotion(program: Program) -> dict[torch.dtype, torch.dtype]:
    """Which dtypes become which: 16-bit → float32 in a 16-bit program, everything → float64 in a float32 one."""
    tensors = [n.meta["val"] for n in program.weights()] + [n.meta["val"] for n in program.placeholders]
    narrow = any(isinstance(t, torch.Tensor) and t.dtype in NARROW for t in tensors)
    if narrow:
        return dict.fromkeys(NARROW, torch.float32)
    return dict.fromkeys((*NARROW, torch.float32), torch.float64)


def run_promoted(program: Program, flat: Sequence[Any], written: dict[str, Any] | None = None) -> Any:
    """Runs the program in the next higher precision: inputs, weights and the dtypes written in the graph.

    written: takes the inputs that the program writes to, by name, as they are after the run.
    """
    wider = promotion(program)
    module, expressions = program.lift()
    weights = program.binder(expressions)(flat)
    inputs = [*(clone(flat[i]) for i in program.arguments), *weights]

    class Promoted(Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = torch.utils._pytree.tree_map(
                lambda a: wider.get(a, a) if isinstance(a, torch.dtype) else a, (args, kwargs)
            )
            return super().call_function(target, args, kwargs)

    inputs = [widen(x, wider) for x in inputs]
    with torch.no_grad():
        outputs = Promoted(module).run(*inputs)
    if written is not None:
        named = zip((n.name for n in program.placeholders), inputs[: len(program.arguments)], strict=True)
        written.update((name, value) for name, value in named if name in program.mutated)
    return outputs


def clone(value: Any) -> Any:
    """A copy of a tensor without its history; anything else as it is."""
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def widen(value: Any, wider: dict[torch.dtype, torch.dtype]) -> Any:
    """A tensor in the dtype that replaces its own; anything else as it is."""
    return value.to(wider.get(value.dtype, value.dtype)) if isinstance(value, torch.Tensor) else value
