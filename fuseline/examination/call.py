"""`fuseline.examine(model, *args)`: what will become of a model, before anything of it is compiled.

Dynamo's graphs of one call, the lines at which they break and the way out; the sites that each pass takes or refuses;
the regions that get kernels, and what stays with PyTorch. `print(examination)` is a report for an issue.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..codegen.lower import lower
from ..compiler.debug.dry_run import Captured, dry_run, sizes_if_asked
from ..compiler.debug.signature import Fixed, fixed_sizes, fixed_values, inputs
from ..compiler.debug.takes import Takes, takes
from ..compiler.errors import CaptureError, FuselineError
from ..compiler.expressions import Param
from ..compiler.framework import Pass
from ..compiler.pipeline import DEFAULT, Pipeline
from ..compiler.program import Program
from ..compiler.provenance import is_ours, module_path, source_line, source_lines
from ..compiler.sites import sites
from .findings import Examination, Fallback, Graph, Leftover, Whole

Passes = str | Path | Iterable[Pass] | Pipeline


def examine(
    model: torch.nn.Module,
    *args: Any,
    pipeline: Passes | None = None,
    **kwargs: Any,
) -> Examination:
    """Examines one call, `model(*args, **kwargs)`, under the grad mode that is set. The model is left as it was.

    Args:
        pipeline: the default one when left out, exact passes only.

    Raises:
        UserError: the arguments are not the model's, the model fails on them by itself, or an unknown pass.
    """
    steps = Pipeline(DEFAULT if pipeline is None else pipeline).passes
    started = time.perf_counter()
    run = dry_run(model, args, kwargs)
    found = _examination(model, steps)
    names = _parameter_names(model)
    found.graphs = [_graph(graph, steps, names) for graph in run.graphs]
    found.breaks = run.breaks
    first = next((g.program for g in run.graphs if g.program is not None), None)
    found.fixed = [
        *(Fixed("attribute", name, values) for name, values in run.changed.items()),
        *_sizes(model, args, kwargs, first, names),
        *fixed_values(args, kwargs, names),
    ]
    if run.error is not None:
        found.error = _sentence(run.error)
    found.seconds = time.perf_counter() - started
    return found


def _sizes(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    program: Program | None,
    names: Sequence[str],
) -> list[Fixed]:
    """The sizes that are numbers in the first graph; a second capture tells which of them have to be."""
    if program is None or not list(fixed_sizes(program)):
        return []
    return list(fixed_sizes(program, names, sizes_if_asked(model, args, kwargs)))


def examine_program(
    model: torch.nn.Module,
    capture: Callable[[], Program],
    pipeline: str | Path | Iterable[Pass] | Pipeline | None = None,
) -> Examination:
    """The same of what is no Python any more (a `.pt2` file): nothing can break, only be refused."""
    steps = Pipeline(DEFAULT if pipeline is None else pipeline).passes
    started = time.perf_counter()
    found = _examination(model, steps)
    try:
        program = capture()
        found.graphs = [_graph(Captured(len(program), program), steps)]
        found.fixed = [replace(one, kind="constant") for one in fixed_sizes(program)]
    except CaptureError as error:
        found.graphs = [Graph(0, refusal="; ".join([error.headline, *error.details]), remedy=error.remedy)]
    found.seconds = time.perf_counter() - started
    return found


def _examination(model: torch.nn.Module, steps: Sequence[Pass]) -> Examination:
    parameters: dict[str, tuple[int, int]] = {}
    for parameter in model.parameters():
        count, size = parameters.get(dtype := str(parameter.dtype).removeprefix("torch."), (0, 0))
        parameters[dtype] = (count + 1, size + parameter.numel() * parameter.element_size())
    name = type(getattr(model, "_orig_mod", model)).__name__
    return Examination(name, str(Pipeline(steps)), parameters=parameters)


def _parameter_names(model: torch.nn.Module) -> Sequence[str]:
    """The names of forward's parameters, for arguments that Dynamo only numbers."""
    try:
        return list(inspect.signature(model.forward).parameters)
    except ValueError:
        return []


def _graph(captured: Captured, steps: Sequence[Pass], names: Sequence[str] = ()) -> Graph:
    program = captured.program
    if program is None:
        return Graph(captured.nodes, refusal=captured.refusal, remedy=captured.remedy)
    result = Graph(len(program), program.training, inputs(program, names), weights_before=program.weight_bytes())
    before = program
    program, result.passes = takes(before, steps)
    result.marked = any(n.op == "call_module" for n in program.graph.nodes) or "fused" in program.state
    result.weights_after = program.weight_bytes()
    if not result.training:  # in training autograd works on ATen, and there are no kernels
        lowered = lower(program)
        result.kernels, result.regions = len(lowered.kernels), len(lowered.launchers)
        for name, reason in lowered.refusals.items():
            nodes = [n for n in lowered.regions[name].graph.nodes if n.op == "call_function"]
            ops = tuple(_op(n) for n in nodes)
            result.fallbacks.append(Fallback(name, reason, ops, source_lines(nodes)))
    result.leftovers = _leftovers(program)
    result.whole = _whole(before, program, result.passes)
    return result


def _leftovers(program: Program) -> list[Leftover]:
    """Ops outside of regions, the most frequent first, views behind the others."""
    found: dict[tuple[str, bool], tuple[int, dict[str, None]]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target.__module__ == "_operator":
            continue
        view = _is_view(node)
        count, lines = found.get((_op(node), view), (0, {}))
        found[_op(node), view] = (count + 1, {**lines, _where(node): None})
    entries = [Leftover(op, count, view, tuple(lines)) for (op, view), (count, lines) in found.items()]
    return sorted(entries, key=lambda entry: (entry.view, -entry.count))


def _where(node: torch.fx.Node) -> str:
    """The user's line, or the module where there is none: a model that is an nn.Sequential has no code of its own."""
    line = source_line(node)
    if line is not None and not is_ours(line):
        return line
    return f"module {path}" if (path := module_path(node)) else "no line is known"


def _is_view(node: torch.fx.Node) -> bool:
    """Whether a call gives back its input's storage, by its schema; a cast declares that too, and copies."""
    schema = getattr(node.target, "_schema", None)
    value, source = node.meta.get("val"), next((a.meta.get("val") for a in node.all_input_nodes), None)
    aliases = schema is not None and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return aliases and getattr(value, "dtype", None) == getattr(source, "dtype", None)


def _op(node: torch.fx.Node) -> str:
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__  # type: ignore[union-attr]


def _whole(captured: Program, program: Program, passes: Sequence[Takes]) -> list[Whole]:
    """Matrices that stay what they were, where others did not; with the refusal of a site that reads them, if any."""
    expressions = {n.meta["weight"]: n.meta["val"] for n in program.weights()}
    if all(isinstance(e, Param) for e in expressions):
        return []
    refusals = {refused.site: refused.reason for one in passes for refused in one.refused}
    names = sites(captured.graph)
    reasons: dict[Any, str] = {}
    for node in captured.weights():
        for user in node.users:
            if (reason := refusals.get(names.get(user, ""))) is not None:
                reasons[node.meta["weight"]] = reason
    found = [
        Whole(e.name, value.numel() * value.element_size(), reasons.get(e, "no pass takes it"))
        for e, value in expressions.items()
        if isinstance(e, Param) and value.dim() > 1 and value.is_floating_point()
    ]
    return sorted(found, key=lambda one: -one.bytes)


def _sentence(error: BaseException) -> str:
    """An error in a line, Dynamo's wrapping taken off."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, FuselineError):
        inner = inner.__cause__ or getattr(inner, "inner_exception", None)
    error = inner or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")
