"""The torch.compile backend: `torch.compile(model, backend="fuseline", options={"pipeline": "…"})`.

`model.compile(backend="fuseline", options=…)` compiles the module itself, which `generate()` then uses;
`torch.compile(model).generate` runs the original module and reaches no backend.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .compile import Compilation, compile_program
from .compiler.action import Observer
from .compiler.capture import from_dynamo, is_training
from .compiler.compat import break_after
from .compiler.deferred import DEFERS
from .compiler.errors import UserError, nearest
from .compiler.graph_breaks import tell_of
from .compiler.heap import settled
from .compiler.lengths import ask_for_sequences, ask_for_symbols
from .compiler.pipeline import DEFAULT, Pipeline
from .compiler.plan import Plan
from .compiler.sharded import run_as_captured
from .compiler.streams import refuse_streams

OPTIONS = (
    "pipeline",
    "plan",
    "target",
    "verify",
    "observers",
    "cuda_graphs",
    "keep_originals",
    "leftovers",
    "recompute",
    "record",
)
recent: deque[Compilation] = deque(maxlen=8)
"""The last compilations of this process, newest last; they keep no model's tensors alive."""


@settled()
def compile(
    module: torch.fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    **settings: Any,
) -> Callable[..., Any]:
    """Compiles a graph that Dynamo captured.

    Options (as `options={…}` of torch.compile):
        pipeline: passes, as text, a TOML file's path or a list; exact passes only when left out.
        plan: for passes that need data, a Plan or its file's path.
        target: "auto", "eager", "inductor" or "triton".
        verify: "off", "quick" or "full".
        observers: watch the passes.
        cuda_graphs: whether calls that are repeated on a GPU are captured (default: yes).
        leftovers: what runs operations without a kernel of ours: "auto", "inductor" or "eager".
        recompute: in training on a GPU, whether what pointwise operations make of saved values is made again in
            backward instead of saved (default: yes).
        record: a callable given the `Compilation`.
        keep_originals: False is for a caller that drops them itself, and takes `record` to do so.
    """
    settings = {**(options or {}), **settings}
    for name in settings:
        if name not in OPTIONS:
            raise UserError(f"backend 'fuseline' has no option '{name}'{nearest(name, OPTIONS)}")
    if mode is not None:
        raise UserError("backend 'fuseline' has no modes", remedy='options={"target": …, "pipeline": …}')
    if not settings.get("keep_originals", True) and "record" not in settings:
        raise UserError(
            "backend 'fuseline' cannot drop originals: it sees parameters, not the model, and could not keep its "
            "state_dict() and to() from handing out what is gone",
            remedy="fuseline.optimize(model, pipeline, keep_originals=False)",
        )
    pipeline = Pipeline(settings.get("pipeline", DEFAULT))
    observers: Sequence[Observer] = settings.get("observers", ())
    plan = settings.get("plan")
    plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if "record" not in settings:  # fuseline.optimize tells of all breaks of its model itself
        tell_of(module)
    captured = run_as_captured(module, inputs, pipeline)
    if captured is not None:
        return captured
    refuse_streams(module)
    if not is_training(inputs):
        pipeline = Pipeline(p for p in pipeline.passes if p not in pipeline.joint)  # there is no backward
        ask_for_symbols(module, inputs)
    if any(step.needs_symbols() for step in pipeline.passes):
        ask_for_sequences(module, inputs)
    program = from_dynamo(module, inputs)
    if program.training and break_after(module) is None:
        program = replace(program, state=program.state | {DEFERS})
    compilation = compile_program(
        program,
        inputs,
        pipeline,
        target=settings.get("target"),
        observers=observers,
        verification=settings.get("verify", "quick"),
        plan=plan,
        cuda_graphs=settings.get("cuda_graphs", True),
        keep_originals=settings.get("keep_originals", True),
        leftovers=settings.get("leftovers", "auto"),
        recompute=settings.get("recompute", True),
    )
    recent.append(
        replace(
            compilation,
            captured=compilation.captured.without_tensors(),
            program=compilation.program.without_tensors(),
            executable=weakref.proxy(compilation.executable),
        )
    )
    if "record" in settings:
        settings["record"](compilation)
    return compilation.executable
