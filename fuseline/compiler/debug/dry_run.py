"""What Dynamo would hand to the backend: a model called once, with a backend that only keeps what it is given.

The graphs are run as they were captured, in eager, since what lies between two of them is Python that reads their
results; nothing is compiled. The model, the arguments, the random state and Dynamo's records of sizes are afterwards
what they were.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from .. import compat
from ..capture import from_dynamo, is_training
from ..errors import FuselineError, UserError
from ..graph_breaks import GraphBreak, read
from ..lengths import ask_for_symbols
from ..pipeline import Pipeline
from ..program import Program
from ..sharded import run_as_captured
from ..streams import refuse_streams
from .remedies import Remedy, remedy

CAPTURES = 64


@dataclass(frozen=True)
class Break:
    """A line at which a graph ended, and the way out."""

    at: GraphBreak
    remedy: Remedy


@dataclass(frozen=True)
class Captured:
    """One graph of Dynamo's: the program, or why the backend takes none from it.

    nodes: of Dynamo's own graph.
    """

    nodes: int
    program: Program | None = None
    refusal: str | None = None
    remedy: str | None = None


@dataclass
class DryRun:
    """What one call of a model comes to.

    changed: attributes of modules that the call changed, `path.name` → (before, after): Dynamo guards such numbers.
    error: what the call raised, where the model alone does not.
    """

    graphs: list[Captured] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    error: Exception | None = None


def dry_run(model: torch.nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> DryRun:
    """Calls `model(*args, **kwargs)` through Dynamo, under the grad mode that is set.

    Raises:
        UserError: the arguments are not the model's, or the model itself fails on them.
    """
    kwargs = dict(kwargs or {})
    _check_call(model, args, kwargs)
    result, state = DryRun(), _Kept()

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        state.graphs.append(_captured(module, inputs))
        return module.forward

    notes = compat.BreakNotes()
    with _undisturbed(model) as changed, compat.fresh_size_records():
        compiled = torch.compile(_call_of(model), backend=backend, **compat.own_recompilations(CAPTURES))
        try:
            compiled(*_clones(args), **_clones(kwargs))
        except FuselineError:
            raise
        except Exception as error:
            result.error = error
    if result.error is not None:
        _check_eager(model, args, kwargs)
    # Dynamo keeps the backend for as long as the model's code: it must not keep the graphs with their parameters.
    result.graphs, state.graphs = state.graphs, []
    result.breaks = _breaks(notes.fresh())
    result.changed = changed
    return result


def sizes_if_asked(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, tuple[int | None, ...]]:
    """The shapes of the first graph's inputs when every size of the arguments may be a symbol: None for a symbol, a
    number where the model's code or its weights allow no other. By the placeholders' names; {} where that fails."""
    found: dict[str, tuple[int | None, ...]] = {}

    def backend(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        for node in module.graph.nodes:
            value = node.meta.get("example_value") if node.op == "placeholder" else None
            if isinstance(value, torch.Tensor):
                found[node.name] = tuple(map(compat.known_size, value.shape))
        raise _Enough

    def ask(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            torch._dynamo.maybe_mark_dynamic(leaf, [dim for dim, size in enumerate(leaf.shape) if size > 1])
        return leaf

    marked = pytree.tree_map(ask, (_clones(args), _clones(kwargs)))
    with _undisturbed(model), compat.fresh_size_records(), contextlib.suppress(Exception):
        compiled = torch.compile(_call_of(model), backend=backend, **compat.own_recompilations(CAPTURES))
        compiled(*marked[0], **marked[1])
    return found


class _Enough(Exception):
    """Ends a capture of which no more is wanted."""


@dataclass
class _Kept:
    graphs: list[Captured] = field(default_factory=list)


def _captured(module: GraphModule, inputs: Sequence[Any]) -> Captured:
    """A graph as the backend would take it, up to the passes."""
    count = len(module.graph.nodes)
    try:
        if run_as_captured(module, inputs, Pipeline(())) is not None:
            return Captured(count, refusal="its parameters are wrappers of other tensors, and it runs without passes")
        refuse_streams(module)
        if not is_training(inputs):
            ask_for_symbols(module, inputs)
        return Captured(count, from_dynamo(module, inputs))
    except FuselineError as error:
        return Captured(count, refusal="; ".join([error.headline, *error.details]), remedy=error.remedy)


def _breaks(notes: Sequence[compat.BreakNote]) -> list[Break]:
    """Each line and kind once; where a whole function was left to Python, with its name."""
    found: dict[tuple[str, int, str], Break] = {}
    for note in notes:
        at = read(note)
        if at is not None:
            advice = remedy(note.reason, at.code)
            key = (at.file, at.line, advice.kind)
            if key not in found or (at.function and not found[key].at.function):
                found[key] = Break(at, advice)
    return list(found.values())


def _call_of(model: torch.nn.Module) -> Callable[..., Any]:
    """The model's call with its hooks; a frame of PyTorch's own (an nn.Sequential's) starts no graph, ours does."""
    model = getattr(model, "_orig_mod", model)
    if (type(model).forward.__module__ or "").startswith("torch."):
        return lambda *args, **kwargs: model._call_impl(*args, **kwargs)
    return model._call_impl


def _check_call(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(model.forward)
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = type(model).__name__
        given = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
        raise UserError(
            f"{name}.forward() cannot be called with these arguments: {error}",
            [f"it takes {signature}", f"given: {', '.join(given) or 'none'}"],
            f"fuseline.examine(model, {', '.join(_wanted(signature)) or '…'})",
        ) from None
    except ValueError:  # a callable without a signature
        return


def _wanted(signature: inspect.Signature) -> list[str]:
    """The parameters that have no default."""
    return [
        name if p.kind is not p.KEYWORD_ONLY else f"{name}=…"
        for name, p in signature.parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 24 else type(value).__name__


def _check_eager(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Tells a model that fails by itself from one that cannot be captured."""
    import traceback

    from ..provenance import is_ours, is_pythons

    try:
        with _undisturbed(model):
            getattr(model, "_orig_mod", model)._call_impl(*_clones(args), **_clones(kwargs))
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_ours(f.filename)]
        frames = [f for f in frames if not is_pythons(f.filename)] or frames
        where = [f"at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}"] if frames else []
        given = [_describe(a) for a in args] + [f"{k}={_describe(v)}" for k, v in kwargs.items()]
        raise UserError(
            f"{type(model).__name__} fails on these inputs, without any compiler: {type(error).__name__}",
            [*where, *str(error).strip().splitlines()[:3], f"given: {', '.join(given) or 'none'}"],
            "example inputs on which model(…) works in eager",
        ) from error


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[dict[str, tuple[Any, Any]]]:
    """Buffers, plain attributes and the random state are put back; yields what the call changed among the attributes.

    Buffers are compared by value: batch normalization writes to its statistics without a new version.
    """
    changed: dict[str, tuple[Any, Any]] = {}
    buffers = [(m, key, b, b.detach().clone()) for m in model.modules() for key, b in _own_buffers(m)]
    plain = [(name, module, dict(_plain(module))) for name, module in model.named_modules()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), _quiet():
        try:
            yield changed
        finally:
            for module, key, buffer, value in buffers:
                module._buffers[key] = buffer
                if buffer.device.type != "meta" and not torch.equal(buffer, value):
                    with torch.no_grad():
                        buffer.copy_(value)
            for name, module, before in plain:
                for key, value in before.items():
                    after = getattr(module, key, None)
                    if after is not value and after != value:
                        changed[f"{name}.{key}".lstrip(".")] = (value, after)
                        setattr(module, key, value)


def _own_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((key, buffer) for key, buffer in module._buffers.items() if buffer is not None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's warnings, and the tracebacks that it logs before it raises, are left out: what matters is reported."""
    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._subclasses.fake_tensor", "fuseline")]
    levels = [log.level for log in loggers]
    for log in loggers:
        if log.getEffectiveLevel() > logging.INFO:  # TORCH_LOGS asked for more
            log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _plain(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in vars(module).items():
        if isinstance(value, (bool, int, float, str)) and not key.startswith("_"):
            yield key, value


def _clones(value: Any) -> Any:
    """The arguments on copies: the call may write to them (a cache)."""

    def clone(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            same = leaf.detach().clone().requires_grad_(leaf.requires_grad)
            vars(same).update({key: mark for key, mark in vars(leaf).items() if key.startswith("_dynamo")})
            return same
        return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else copy.deepcopy(leaf)

    return pytree.tree_map(clone, value)
