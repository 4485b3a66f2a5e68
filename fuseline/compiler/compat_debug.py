"""The half of `compat.py` that debugging needs: symbols, structured traces, PyTorch's own bisector."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def settle(mode: FakeTensorMode) -> None:
    """Puts right what an exception from outside, as an alarm's, may have left between two lines of a fake kernel's
    call: the mode would take itself to be within that call for good."""
    mode.in_kernel_invocation = False


def symbols_in(value: Any) -> list[str]:
    """The names of the symbols in a value's sizes, strides or expression, in order."""
    found: dict[str, None] = {}
    for leaf in torch.utils._pytree.tree_leaves(value):
        parts = (*leaf.shape, *leaf.stride()) if isinstance(leaf, torch.Tensor) else (leaf,)
        for part in parts:
            if isinstance(part, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                for symbol in sorted(part.node.expr.free_symbols, key=str):
                    found[str(symbol)] = None
    return list(found)


def symbol_bounds(mode: FakeTensorMode) -> dict[str, dict[str, int]]:
    """Each symbol's hint and range: `{"s0": {"hint": 64, "low": 2, "high": 4096}}`; no `high` where there is none."""
    env = mode.shape_env
    found: dict[str, dict[str, int]] = {}
    if env is None:
        return found
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    for symbol, bounds in env.var_to_range.items():
        if symbol not in hints:
            continue
        entry = {"hint": int(hints[symbol])}
        for name, bound in (("low", bounds.lower), ("high", bounds.upper)):
            if bound.is_number and abs(bound) < 2**48:  # what is larger, or symbolic, stands for no bound
                entry[name] = int(bound)
        found[str(symbol)] = entry
    return found


def new_symbols(mode: FakeTensorMode, bounds: dict[str, dict[str, int]]) -> dict[str, torch.SymInt]:
    """Fresh symbols of a mode, with these hints and ranges."""
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic
    from torch.utils._sympy.numbers import int_oo
    from torch.utils._sympy.value_ranges import ValueRanges

    env = mode.shape_env
    found: dict[str, torch.SymInt] = {}
    for name, entry in bounds.items():
        assert env is not None
        source = ConstantSource(name)
        symbol = env.create_symbol(
            entry["hint"], source, dynamic_dim=DimDynamic.DYNAMIC, do_not_specialize_zero_one=True
        )
        env.var_to_range[symbol] = ValueRanges(entry.get("low", 0), entry.get("high", int_oo))
        found[name] = env.create_symintnode(symbol, hint=entry["hint"], source=source)
    return found


def capture_id() -> str | None:
    """Dynamo's name of the capture under way, `frame/compilation`; None outside of one."""
    context = torch._guards.CompileContext.current_compile_id()
    return str(context) if context is not None else None


def structured_tracing() -> bool:
    """Whether somebody reads PyTorch's structured trace. Its own handler is there without TORCH_TRACE too, and has no
    folder then; others count where they format a trace, for pytest listens to every logger."""
    handlers = torch._logging._internal.trace_log.handlers
    return any(
        h.root_dir is not None if hasattr(h, "root_dir") else getattr(h.formatter, "_is_trace", False) for h in handlers
    )


def trace_artifact(name: str, encoding: str, payload: Callable[[], Any]) -> None:
    """Writes a named artifact ("string" or "json") into the structured trace, where one is written."""
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


def bisector_is_running() -> bool:
    """Whether PyTorch's compiler bisector drives this process."""
    module = sys.modules.get("torch._inductor.compiler_bisector")
    return module is not None and bool(module.CompilerBisector.bisection_enabled)


def bisector_disables(backend: str, subsystem: str, info: Callable[[], str]) -> bool:
    """Whether PyTorch's compiler bisector wants the next application of a subsystem left out."""
    from torch._inductor.compiler_bisector import CompilerBisector

    return bool(CompilerBisector.disable_subsystem(backend, subsystem, info))


def join_bisector(backend: str, subsystem: str) -> None:
    """Makes PyTorch's compiler bisector search a backend's subsystem after its own."""
    from torch._inductor.compiler_bisector import BACKENDS, BisectSubsystem

    if backend not in BACKENDS:
        BACKENDS[backend] = [BisectSubsystem(subsystem)]
