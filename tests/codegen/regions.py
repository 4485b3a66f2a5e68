"""Regions for the emitter's tests: traced from plain functions, run through an emitted module, compared with eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from fuseline.codegen.emitter import emit_region
from fuseline.codegen.kernel import Launcher, Refusal
from fuseline.codegen.module_file import load_module, write_module

#: The largest error of a result, over the largest magnitude in it: a few roundings of the type.
BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def region(
    function: Callable[..., Any], inputs: Sequence[Any], dynamic: Mapping[int, Sequence[int]] | None = None
) -> torch.fx.GraphModule:
    """`function` as a graph with fake values. `dynamic[i]` lists the dimensions of input i that become symbols;
    dimensions of equal size share one. An int among the inputs becomes a SymInt."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(k: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            source = ConstantSource(f"size{k}")
            symbol = mode.shape_env.create_symbol(value, source, DimDynamic.DUCK)
            return mode.shape_env.create_symintnode(symbol, hint=value, source=source)
        dims = (dynamic or {}).get(k, ())
        kinds = [DimDynamic.DUCK if d in dims else DimDynamic.STATIC for d in range(value.dim())]
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        return mode.from_tensor(value, source=ConstantSource(f"x{k}"), symbolic_context=context)

    fakes = [fake(k, v) for k, v in enumerate(inputs)]
    with mode:
        return make_fx(function, tracing_mode="real", pre_dispatch=True)(*fakes)


def emitted(function: Callable[..., Any], *inputs: Any, dynamic: Mapping[int, Sequence[int]] | None = None) -> Launcher:
    """The launcher of `function`; fails with the reason where the emitter refuses."""
    launcher = emit_region(region(function, inputs, dynamic), "fused")
    assert isinstance(launcher, Launcher), launcher
    return launcher


def refused(function: Callable[..., Any], *inputs: Any, dynamic: Mapping[int, Sequence[int]] | None = None) -> str:
    """The reason for which the emitter refuses `function`."""
    answer = emit_region(region(function, inputs, dynamic), "fused")
    assert isinstance(answer, Refusal), answer.source
    return answer.reason


class Poisoned:
    """`torch` with buffers that are never what a kernel forgot to write: NaN, or the type's largest integer."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return poison(torch.empty(*args, **kwargs))

    def empty_strided(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return poison(torch.empty_strided(*args, **kwargs))


def poison(buffer: torch.Tensor) -> torch.Tensor:
    if buffer.dtype == torch.bool:
        return buffer.fill_(True)
    return buffer.fill_(float("nan") if buffer.is_floating_point() else torch.iinfo(buffer.dtype).max)


def loaded(launcher: Launcher, folder: Path) -> Callable[..., Any]:
    """The launcher's function, from a file, with poisoned buffers."""
    path = folder / f"{launcher.name}.py"
    write_module(path, [launcher])
    module = load_module(path)
    module.torch = Poisoned()
    return getattr(module, launcher.name)


def check(
    function: Callable[..., Any],
    *inputs: Any,
    folder: Path,
    dynamic: Mapping[int, Sequence[int]] | None = None,
    run: Sequence[Sequence[Any]] = (),
    bound: float | None = None,
    least: float = 1e-30,
) -> Launcher:
    """Emits `function`, runs it on `inputs` and on each of `run`, and compares with eager in float64."""
    launcher = emitted(function, *inputs, dynamic=dynamic)
    call = loaded(launcher, folder)
    for given in (inputs, *run):
        compare(function, call, given, bound, least)
    return launcher


def compare(
    function: Callable[..., Any],
    call: Callable[..., Any],
    inputs: Sequence[Any],
    bound: float | None = None,
    least: float = 1e-30,
) -> None:
    """Shapes, dtypes and strides as eager's; values as eager's in float64, within the bound of the result's dtype."""
    kept = [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
    ours, plain = _flat(call(*inputs)), _flat(function(*inputs))
    exact = _flat(function(*(_wide(v) for v in inputs)))
    assert len(ours) == len(plain)
    for result, eager, reference in zip(ours, plain, exact, strict=True):
        if not isinstance(eager, torch.Tensor):
            assert result == eager
            continue
        assert (result.shape, result.dtype) == (eager.shape, eager.dtype)
        if result.is_floating_point():
            assert error(result, reference, least) <= (bound or BOUNDS[result.dtype])
        else:
            assert torch.equal(result, eager), (result, eager)
    for before, after in zip(kept, inputs, strict=True):
        assert not isinstance(before, torch.Tensor) or torch.equal(before, after) or before.isnan().any()


def _flat(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def error(result: torch.Tensor, reference: torch.Tensor, least: float = 1e-30) -> float:
    """max|Δ| / max(|reference|, least); infinite where one is not finite and the other differs."""
    result, reference = result.double(), reference.double()
    finite = reference.isfinite()
    if not torch.equal(result.nan_to_num(7, 8, 9)[~finite], reference.nan_to_num(7, 8, 9)[~finite]):
        return float("inf")
    if not finite.any():
        return 0.0
    gap = (result[finite] - reference[finite]).abs().max()
    return float("inf") if gap.isnan() else float(gap / reference[finite].abs().max().clamp(min=least))
