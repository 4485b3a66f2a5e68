"""From a captured program to something that runs: the pipeline, then a target."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .codegen.kernel import Kernel
from .compiler import compat, compat_joint
from .compiler.action import Observer
from .compiler.deferred import cut, positions
from .compiler.errors import FuselineError, UserError, nearest
from .compiler.expand import expand_at_use, expand_weights
from .compiler.flatten import anchors_only, flatten
from .compiler.joint import Joint
from .compiler.observe.structured import trace_module
from .compiler.outline import inline
from .compiler.pipeline import Pipeline
from .compiler.plan import Plan
from .compiler.program import Program
from .compiler.reads import refuse_dropped
from .compiler.report import Report
from .compiler.sharded import refuse_derived
from .failures import explain_lowering
from .runtime import linear_cross_entropy, ranks
from .runtime.deferred import WithTails
from .runtime.executable import Executable
from .runtime.graphs import CudaGraphs, Layout
from .runtime.leftovers import CHOICES, Leftover, install
from .runtime.location import keep_module
from .runtime.recorder import CudaRecorder

log = logging.getLogger("fuseline")
_numbers = itertools.count(1)  # of a process's graphs, in messages
TARGETS = ("auto", "eager", "inductor", "triton")


@dataclass
class Compilation:
    """One graph that was compiled: before, after, what the passes did, and how it runs; joint: forward and backward in
    one graph, after the passes of that level."""

    captured: Program
    program: Program
    report: Report
    target: str
    executable: Callable[..., Any] = field(repr=False)
    kernels: tuple[Kernel, ...] = ()
    refusals: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    leftovers: dict[str, Leftover] = field(default_factory=dict, repr=False)
    joint: Program | None = None


def choose_target(target: str | None, program: Program) -> str:
    """`auto` is Triton for tensors on a GPU with triton installed (Inductor in training), and eager otherwise.

    Raises:
        UserError: for an unknown target, or one that this machine cannot run.
    """
    target = target or "auto"
    if target not in TARGETS:
        raise UserError(f"unknown target '{target}'{nearest(target, TARGETS)}")
    on_gpu = _on_gpu(program)
    has_triton = find_spec("triton") is not None
    if program.training:  # autograd works on ATen: Inductor writes the kernels, forward and backward
        faster = target in ("auto", "triton") and on_gpu and has_triton
        return "inductor" if target == "inductor" or faster else "eager"
    if target == "auto":
        return "triton" if on_gpu and has_triton else "eager"
    if target == "triton" and not has_triton:
        raise UserError("target 'triton' needs the package triton", remedy="pip install triton, or target=eager")
    if target == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            "target 'triton' needs a model on a GPU",
            ["this program's tensors are on the CPU"],
            "target=eager; or TRITON_INTERPRET=1 to run the kernels in Triton's interpreter",
        )
    return target


def _on_gpu(program: Program) -> bool:
    values = [n.meta.get("val") for n in program.graph.nodes]
    return any(isinstance(v, torch.Tensor) and v.device.type == "cuda" for v in values)


def compile_program(
    program: Program,
    inputs: Sequence[Any],
    pipeline: Pipeline,
    target: str | None = None,
    observers: Sequence[Observer] = (),
    verification: str = "quick",
    plan: Plan | None = None,
    cuda_graphs: bool = True,
    keep_originals: bool = True,
    leftovers: str = "auto",
    recompute: bool = True,
) -> Compilation:
    """Runs the pipeline over a captured program and makes it executable on its flat arguments.

    Args:
        inputs: the caller's flat example arguments; derived weights are computed from them right away, so that a bad
            weight is reported here and not in the middle of a call.
        cuda_graphs: capture calls that are repeated, where the target is Triton on a GPU.
        keep_originals: False leaves quantized weights packed in eager too, each expanded where it is used.
        recompute: in training through Inductor, make what pointwise operations make of saved values again in backward
            instead of saving it too.
        leftovers: what runs the operations that no kernel of ours takes, where the target is Triton on a GPU: "eager"
            (PyTorch), "inductor", or "auto", the faster one.

    Raises:
        UserError: the rewritten graph reads a parameter as it is whose values were dropped.
    """
    chosen = choose_target(target, program)
    if leftovers not in CHOICES:
        raise UserError(f"leftovers cannot be '{leftovers}'{nearest(leftovers, CHOICES)}", remedy=", ".join(CHOICES))
    after, report = pipeline.run(program, observers, verification, plan)
    refuse_dropped(after)
    refuse_derived(after)
    result = Compilation(program, after, report, chosen, _unbuilt)
    if after.training:
        joint = Joint(pipeline, chosen == "inductor", observers, verification, report)
        result.executable = _training(after, inputs, chosen, recompute, joint if joint.wanted(after) else None)
        joint.check()
        result.joint = joint.program
        return result
    targets: dict[str, Callable[..., Executable]] = {
        "eager": _eager if keep_originals else _packed,
        "inductor": _through_inductor,
        "triton": partial(_kernels, leftovers=leftovers),
    }
    try:
        executable = targets[chosen](after, inputs, result)
    except Exception as error:
        if chosen == "triton":
            explain_lowering(error, program, pipeline)
        raise
    executable.binder(inputs)
    if cuda_graphs and chosen == "triton":
        executable.graphs = _cuda_graphs(after, executable)
    result.executable = executable
    return result


def _cuda_graphs(program: Program, executable: Executable) -> CudaGraphs | None:
    """Captures for a program that works on one GPU."""
    values = [n.meta["val"] for n in program.placeholders]
    devices = {v.device for n in program.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)}
    if len(devices) != 1 or (device := devices.pop()).type != "cuda":  # a copy between devices waits for the GPU
        return None
    positions = dict(zip((n.name for n in program.placeholders), program.arguments, strict=True))
    symbolic = any(_is_symbolic(v) for v in values)
    layout = Layout(executable.arguments, [positions[name] for name in sorted(program.mutated)], symbolic)
    return CudaGraphs(executable.run, layout, executable.binder, CudaRecorder(device))


def _is_symbolic(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return any(isinstance(s, torch.SymInt) for s in (*value.shape, *value.stride()))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def _unbuilt(*flat: Any) -> Any:
    raise FuselineError("this compilation was not finished")


def _eager(program: Program, inputs: Sequence[Any], result: Compilation) -> Executable:
    """The graph as it stands, regions inlined; packed weights expanded once."""
    module, weights = program.lift()
    module = inline(module)
    weights = expand_weights(module, weights)
    run = ranks.watched(module.graph, module, f"graph {next(_numbers)}")
    return Executable(run, program.arguments, program.binder(weights))


def _packed(program: Program, inputs: Sequence[Any], result: Compilation) -> Executable:
    """The graph as it stands, packed weights expanded one at a time, where each is used: as slow as it is small."""
    module, weights = program.lift()
    return Executable(expand_at_use(inline(module)), program.arguments, program.binder(weights))


def _through_inductor(program: Program, inputs: Sequence[Any], result: Compilation) -> Executable:
    """The graph in plain ATen, compiled by Inductor."""
    module, weights = program.lift()
    binder = program.binder(weights)
    bound = [*(inputs[i] for i in program.arguments), *binder(inputs)]
    return Executable(_inductor(flatten(program, module), bound), program.arguments, binder)


def _kernels(program: Program, inputs: Sequence[Any], result: Compilation, leftovers: str) -> Executable:
    """A generated module of Triton kernels, written to the cache and imported from there."""
    from .codegen.lower import lower  # needs no triton, but the module that it writes does
    from .codegen.module_file import load_module
    from .runtime.kernels import wrap

    if leftovers == "auto" and not _on_gpu(program):  # kernels are interpreted: nothing to be measured
        leftovers = "eager"
    lowered = lower(program, leftovers=leftovers != "eager")
    result.path = keep_module(lowered.write)
    result.kernels, result.refusals = lowered.kernels, lowered.refusals
    trace_module(result.path, lowered.manifest)
    log.info(
        "%d kernels for %d regions, %d regions through PyTorch: %s",
        len(lowered.kernels), len(lowered.launchers), len(lowered.refusals), result.path,
    )  # fmt: skip
    module = wrap(load_module(result.path))
    result.leftovers = install(module, lowered.leftovers, result.refusals, leftovers)
    return Executable(module.call, program.arguments, program.binder(lowered.weights))


def _inductor(
    module: torch.fx.GraphModule, inputs: Sequence[Any], recompute: bool = False, partition: Joint | None = None
) -> Callable[..., Any]:
    try:
        if partition is not None:
            return compat_joint.inductor_through(module, inputs, partition.split, partition.key)
        return compat.inductor(module, inputs, recompute)
    except FuselineError:
        raise
    except Exception as error:
        text = str(error)
        if "compiler" in text.lower() and ("c++" in text.lower() or "gcc" in text.lower() or "cl is not" in text):
            raise UserError(
                "target 'inductor' needs a C++ compiler, and none was found",
                [text.splitlines()[0]],
                "apt-get install g++ (or set CXX), or target=eager",
            ) from error
        raise FuselineError(
            f"Inductor could not compile the graph: {type(error).__name__}", text.splitlines()[:4]
        ) from error


def _training(
    program: Program, inputs: Sequence[Any], target: str, recompute: bool, partition: Joint | None = None
) -> Callable[..., Any]:
    """Forward and backward through AOTAutograd, parameters as ordinary inputs so that gradients reach them."""
    module, weights = program.lift()
    binder = program.binder(weights)
    plain = flatten(program, module, anchors_only if target == "eager" else lambda op: True)
    plain, tails = cut(plain)
    linear_cross_entropy.count_flops()
    order = [n for n in plain.graph.nodes if n.op == "placeholder"]
    deferred = {place: (tail, *positions(tail, order)) for place, tail in tails.items()}
    bound = [*(inputs[i] for i in program.arguments), *binder(inputs)]
    number = next(_numbers)
    if target == "inductor":  # its backward is its own; where that fails, the others' notes tell of it
        run = ranks.watched(plain.graph, _inductor(plain, bound, recompute, partition), f"graph {number}")
    else:
        around = lambda part: lambda found, run: ranks.watched(found.graph, run, f"{part} of graph {number}")
        as_it_is = lambda graph_module, fakes: graph_module
        split = partition.split if partition is not None else None
        run = compat.aot_autograd(plain, bound, as_it_is, as_it_is, split, around)
    return Executable(WithTails(run, deferred) if deferred else run, program.arguments, binder)
