"""`fuseline.optimize`: on a model, or as a decorator of an `nn.Module` class.

    model = fuseline.optimize(model, "raise,quantize{weights=int8},fuse")

    @fuseline.optimize("raise,fuse")
    class Net(torch.nn.Module): ...

Either way the model is still the object its user had: parameters, `state_dict()`, hooks, `generate()` and
`train()`/`eval()` are its own; only its forward is compiled, at its first call. Where a model has a generation config,
`disable_compile` is set in it: on a GPU, `generate()` would compile a static cache's decode steps by itself otherwise.
Where transformers loops over experts, they run as one op a layer (`set_experts_implementation("fuseline")`), as that
loop is no graph.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import torch

from .backend import compile as backend_compile
from .calibrate import analyze
from .compile import TARGETS, Compilation
from .compiler.action import Observer
from .compiler.binder import refresh as _refresh_binders
from .compiler.compat import own_recompilations
from .compiler.errors import UserError, nearest
from .compiler.expressions import Expression
from .compiler.framework import Pass
from .compiler.graph_breaks import GraphBreak, watched
from .compiler.pipeline import DEFAULT, Pipeline, needs_calibration
from .compiler.plan import Plan
from .compiler.weights import STORE
from .hooks import prepare
from .originals import drop_originals
from .runtime.leftovers import CHOICES

Passes = str | Path | Iterable[Pass] | Pipeline
Module = TypeVar("Module", bound=torch.nn.Module)
CAPTURES = 64
"""Captures of one piece of a model's code before Dynamo gives up and runs it in eager: see docs/generation.md."""


@dataclass
class Optimized:
    """How a model was optimized, and what was compiled for it so far.

    derived: expressions over the model's parameters, by their names, whose values a loaded model came with.
    """

    pipeline: Pipeline
    plan: Plan | None
    keep_originals: bool
    compilations: list[Compilation] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)
    derived: tuple[Expression, ...] = ()


_optimized: weakref.WeakKeyDictionary[torch.nn.Module, Optimized] = weakref.WeakKeyDictionary()


@overload
def optimize(
    model: Module,
    pipeline: Passes = ...,
    *,
    calibration: Iterable[Any] | None = ...,
    plan: Plan | str | Path | None = ...,
    target: str | None = ...,
    observers: Sequence[Observer] = ...,
    verify: str = ...,
    cuda_graphs: bool = ...,
    keep_originals: bool = ...,
    leftovers: str = ...,
    dynamic: bool | None = ...,
    fullgraph: bool = ...,
) -> Module: ...
@overload
def optimize(
    model: Passes = ...,
    *,
    plan: Plan | str | Path | None = ...,
    target: str | None = ...,
    observers: Sequence[Observer] = ...,
    verify: str = ...,
    cuda_graphs: bool = ...,
    keep_originals: bool = ...,
    leftovers: str = ...,
    dynamic: bool | None = ...,
    fullgraph: bool = ...,
) -> Callable[[type[Module]], type[Module]]: ...
def optimize(
    model: Any = DEFAULT,
    pipeline: Passes = DEFAULT,
    *,
    calibration: Iterable[Any] | None = None,
    plan: Plan | str | Path | None = None,
    target: str | None = None,
    observers: Sequence[Observer] = (),
    verify: str = "quick",
    cuda_graphs: bool = True,
    keep_originals: bool = True,
    leftovers: str = "auto",
    dynamic: bool | None = None,
    fullgraph: bool = False,
) -> Any:
    """Compiles a model's forward with a pipeline; returns the same model, or a class decorator.

    Args:
        model: a module; or, for a decorator, the pipeline.
        pipeline: exact passes only when left out.
        calibration: batches for passes that need data, on an instance; see `fuseline.analyze`.
        plan: what such passes decided earlier: a Plan, or its file's path.
        target: "auto" (default), "eager", "inductor" or "triton".
        cuda_graphs: whether calls that are repeated with the same sizes and caches are captured, on a GPU.
        keep_originals: False drops each parameter that the graphs read only quantized or folded, once the call that
            compiled them is over; `state_dict()`, `train()`, conversions and copies are refused from then on, and
            `fuseline.save` keeps the model. See docs/saving.md.
        leftovers: what runs the operations that no kernel of ours takes, on a GPU: "eager" (PyTorch), "inductor", or
            "auto", the one that was faster when their first call timed both.
        dynamic, fullgraph: as in torch.compile.

    Raises:
        UserError: at once for an unknown pass, option or target; nothing is changed then.
    """
    if target is not None and target not in TARGETS:
        raise UserError(f"unknown target '{target}'{nearest(target, TARGETS)}")
    if leftovers not in CHOICES:
        raise UserError(f"leftovers cannot be '{leftovers}'{nearest(leftovers, CHOICES)}", remedy=", ".join(CHOICES))
    settings: dict[str, Any] = {
        "target": target, "observers": observers, "verify": verify, "cuda_graphs": cuda_graphs,
        "keep_originals": keep_originals, "leftovers": leftovers, "dynamic": dynamic, "fullgraph": fullgraph,
    }  # fmt: skip
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        raise UserError("the decorator takes a pipeline", remedy='@fuseline.optimize("raise,fuse")')
    settings["plan"] = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
    if not isinstance(model, torch.nn.Module):
        if calibration is not None:
            raise UserError(
                "a class has no weights to calibrate yet",
                remedy="calibrate an instance: fuseline.optimize(model, pipeline, calibration=batches)",
            )
        return functools.partial(_decorate, pipeline=Pipeline(model), settings=settings)
    chosen = Pipeline(pipeline)
    if calibration is not None and settings["plan"] is None:
        settings["plan"] = analyze(model, chosen, calibration)
    if chosen.needs_data and settings["plan"] is None:
        raise needs_calibration(chosen)
    # What another pipeline derived would stay beside it; and adapters are merged by edits of `.data`, unversioned ones.
    STORE.forget([*model.parameters(), *model.buffers()])
    return _compile_in_place(model, chosen, settings)


def _compile_in_place(model: torch.nn.Module, pipeline: Pipeline, settings: dict[str, Any]) -> torch.nn.Module:
    prepare(model)
    state = Optimized(pipeline, settings["plan"], settings["keep_originals"])
    _optimized[model] = state
    weak = weakref.ref(model)  # Dynamo keeps what it is given here, beyond the model's life

    def record(compilation: Compilation) -> None:
        compiled = weak()
        if compiled is not None:
            _optimized[compiled].compilations.append(compilation)

    choices: dict[str, Any] = {
        "backend": backend_compile,
        "dynamic": settings["dynamic"],
        "fullgraph": settings["fullgraph"],
        **own_recompilations(CAPTURES),
        "options": {
            "pipeline": pipeline,
            "plan": settings["plan"],
            "target": settings["target"],
            "observers": tuple(settings["observers"]),
            "verify": settings["verify"],
            "cuda_graphs": settings["cuda_graphs"],
            "keep_originals": settings["keep_originals"],
            "leftovers": settings["leftovers"],
            "record": record,
        },
    }
    generation = getattr(model, "generation_config", None)
    if generation is not None and hasattr(generation, "disable_compile"):
        # On a GPU, generate() with a static cache would hand its decode steps to a compiler of its own.
        generation.disable_compile = True
    if (type(model).forward.__module__ or "").startswith("torch."):
        # Dynamo starts no graph in a frame of PyTorch's own, and would run an nn.Sequential in eager without a word.
        def forward(*args: Any, **kwargs: Any) -> Any:
            return model._call_impl(*args, **kwargs)

        model._compiled_call_impl = torch.compile(forward, **choices)
    else:
        model.compile(**choices)
    model._compiled_call_impl = watched(model._compiled_call_impl, state.breaks, type(model).__name__)
    if not state.keep_originals:
        _drop_after_calls(model, state)
    return model


def _drop_after_calls(model: torch.nn.Module, state: Optimized) -> None:
    """Drops originals at the end of each call that compiled something: by then all graphs of the call are known."""
    compiled, weak, known = model._compiled_call_impl, weakref.ref(model), 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal known
        result = compiled(*args, **kwargs)
        if len(state.compilations) != known and (module := weak()) is not None:
            known = len(state.compilations)
            drop_originals(module, state.compilations)
        return result

    model._compiled_call_impl = call


def _decorate(kind: type[torch.nn.Module], pipeline: Pipeline, settings: dict[str, Any]) -> type[torch.nn.Module]:
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise UserError(f"fuseline.optimize decorates nn.Module classes, not {kind!r}")
    original = kind.__init__

    @functools.wraps(original)
    def initialise(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _compile_in_place(self, pipeline, settings)

    kind.__init__ = initialise  # type: ignore[method-assign]
    return kind


def reports(model: torch.nn.Module) -> list[Compilation]:
    """What was compiled for a model so far, one entry a captured graph."""
    return list(optimized(model).compilations)


def breaks(model: torch.nn.Module) -> list[GraphBreak]:
    """Where graphs of a model ended before its forward did, so far: file, line and reason of each."""
    return list(optimized(model).breaks)


def is_optimized(model: torch.nn.Module) -> bool:
    """Whether `fuseline.optimize` had this model, which then is set not to be compiled by `generate()`."""
    return model in _optimized


def optimized(model: torch.nn.Module) -> Optimized:
    """How `model` was optimized.

    Raises:
        UserError: it was not.
    """
    if not is_optimized(model):
        raise UserError("this model was not optimized", remedy="fuseline.optimize(model, …)")
    return _optimized[model]


def refresh(model: torch.nn.Module) -> None:
    """Has every weight of `model` looked at again, after edits that PyTorch does not version (`p.data.copy_()`)."""
    STORE.forget([*model.parameters(), *model.buffers()])
    _refresh_binders()
