"""Everything that rests on a private PyTorch API, in one place; what debugging needs of it is in `compat_debug.py`,
what `torch.distributed` hides in `compat_distributed.py`.

Checked with torch 2.11.0 and 2.13.0. A new PyTorch version is a change to this file and to its tests, nowhere else.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .compat_debug import (
    bisector_disables as bisector_disables,
    bisector_is_running as bisector_is_running,
    capture_id as capture_id,
    join_bisector as join_bisector,
    new_symbols as new_symbols,
    structured_tracing as structured_tracing,
    symbol_bounds as symbol_bounds,
    symbols_in as symbols_in,
    trace_artifact as trace_artifact,
)
from .compat_distributed import (
    collectives as collectives,
    gathered as gathered,
    gradients_are_averaged as gradients_are_averaged,
    group_name as group_name,
    is_wrapper as is_wrapper,
    mesh_groups as mesh_groups,
    shared_store as shared_store,
)
from .compat_joint import Around, boxed

CHECKED_VERSIONS = ("2.11.0", "2.13.0")

# All are missing from builds without CUDA.
_ADDRESSES_EQUAL = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
_RAW_STREAM = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_CAPTURING = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)

# Ops that are made of others, and whose results are new memory whatever their arguments.
_ALWAYS_NEW = frozenset(
    {
        "matmul", "linear", "conv1d", "conv2d", "conv3d", "softmax", "log_softmax", "scaled_dot_product_attention",
        "layer_norm", "rms_norm", "group_norm", "batch_norm", "where",
    }
)  # fmt: skip
_ATTRIBUTE = re.compile(
    r"\.(?:__dict__\['_(?:modules|parameters|buffers)'\]|_(?:modules|parameters|buffers))\['([^']+)'\]"
)
_STATE = re.compile(r"\.(?:__dict__\['_(?:parameters|buffers)'\]|_(?:parameters|buffers))\['[^']+'\]$")


def dynamo_fake_inputs(inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Fake copies of a backend's example inputs in Dynamo's own mode, so that its symbols are kept."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if context is None or mode is None:
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        return mode, [mode.from_tensor(x, static_shapes=True) if is_real(x) else x for x in inputs]
    fakes = []
    for x in inputs:
        if not is_real(x):
            fakes.append(x)
            continue
        symbols = context.tensor_to_context.get(x)
        source = symbols.tensor_source if symbols is not None else None
        fakes.append(mode.from_tensor(x, static_shapes=symbols is None, symbolic_context=symbols, source=source))
    return mode, fakes


@contextlib.contextmanager
def on_fake_values(mode: FakeTensorMode) -> Iterator[None]:
    """Operations on fake tensors, without gradients. Composite ones (`linear`) run as PyTorch's Python decompositions:
    on torch 2.11 those in C++ refuse symbolic sizes."""
    with enable_python_dispatcher(), mode, torch.no_grad():
        yield


def same_addresses(values: Sequence[Any], addresses: list[int | None], positions: list[int]) -> bool:
    """Whether the tensors at `positions` of `values` lie at those of `addresses`, a list as long as `values`.

    Builds with CUDA have a loop for it in C++. `runtime/watch.py` has a faster one, and this for where that cannot be.
    """
    if _ADDRESSES_EQUAL is not None:
        return bool(_ADDRESSES_EQUAL(list(values), addresses, positions))
    return all(values[i].data_ptr() == addresses[i] for i in positions)


def implementation(tensor: torch.Tensor) -> int:
    """Where the C++ tensor behind a Python one lies, a `c10::TensorImpl`."""
    return int(tensor._cdata)


def current_stream(device: torch.device) -> int:
    """The handle of a CUDA device's current stream."""
    return stream_reader(device)()


def stream_reader(device: torch.device) -> Callable[[], int]:
    """What reads the handle of a CUDA device's current stream, at the lowest cost: this runs at every call."""
    if _RAW_STREAM is not None and device.index is not None:
        return partial(_RAW_STREAM, device.index)
    return lambda: int(torch.cuda.current_stream(device).cuda_stream)


def capture_reader() -> Callable[[], bool]:
    """What says whether the current CUDA stream is being captured, at the lowest cost."""
    return _CAPTURING if _CAPTURING is not None else torch.cuda.is_current_stream_capturing


def is_real(x: Any) -> bool:
    """Whether a value is a tensor with elements, not a fake one."""
    return isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)


def dynamo_source(node: torch.fx.Node) -> str:
    """Where Dynamo found a placeholder, e.g. `L['self']._modules['fc']._parameters['weight']`; "" if unknown."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name or "")


def own_recompilations(limit: int) -> dict[str, Any]:
    """Arguments of torch.compile that let a model be captured `limit` times, whatever other models take.

    Dynamo counts captures per code object, 8 by default, and runs the model in eager beyond them. Models of one library
    share code objects. PyTorch 2.11 knows one limit for the whole process: it is raised there.
    """
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": limit, "isolate_recompiles": True}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    return {}


def sizes_may_become_symbolic() -> bool:
    """Whether the capture under way learns sizes as it goes: not under `dynamic=False`, nor outside of Dynamo."""
    from torch._dynamo import config

    return bool(config.automatic_dynamic_shapes) and TracingContext.try_get() is not None


def capture_again_with_symbols(
    sizes: Collection[tuple[str, int]], scalars: Collection[int], holders: Collection[str]
) -> None:
    """Has Dynamo restart the capture under way with these sizes as symbols; returns if nothing is left to ask for.

    Dynamo makes a size symbolic where its records hold two values of it; here they are told that they do. Marking the
    tensors would do as well, but the marks are guarded, and a cache lives on with them.

    Args:
        sizes: sources of the graph's inputs and dimensions of them.
        scalars, holders: a Python int of such a value that Dynamo read from an attribute of one of these sources.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis
    from torch._dynamo.pgo import auto_dynamic, get_code_state

    asked = False
    records = [code.automatic_dynamic for code in get_code_state().values()]
    for source, dim in sizes:
        for record in records:
            entry = record.get(source)
            if entry is not None and isinstance(entry.size, tuple) and dim < len(entry.size):
                if entry.size[dim] is not auto_dynamic:
                    entry.size = tuple(auto_dynamic if i == dim else size for i, size in enumerate(entry.size))
                    asked = True
    for source in {name for name in _guarded_names() if scalars and name.rpartition(".")[0] in holders}:
        for record in records:
            entry = record.get(source)
            if entry is not None and isinstance(entry.scalar, int) and entry.scalar in scalars:
                entry.scalar = auto_dynamic
                asked = True
    if not asked:
        return

    class Restart(TensorifyScalarRestartAnalysis, UnspecializeRestartAnalysis):  # type: ignore[misc]
        """The first lets it out of the backend call, the second forgets what the trace had speculated."""

    raise Restart(restart_reason="fuseline asked for symbolic lengths")


def _guarded_names() -> Iterator[str]:
    """The sources that the capture under way guards."""
    context = TracingContext.try_get()
    for guard in context.guards_context.dynamo_guards if context is not None else ():
        name = guard.originating_source.name
        yield str(name() if callable(name) else name)


@dataclass(frozen=True)
class BreakNote:
    """What Dynamo noted of a graph break: its message, the frames (file, line) that led there, outermost first, and
    the function that was left to Python as a whole, if one was."""

    reason: str
    frames: tuple[tuple[str, int], ...]
    function: str | None = None


def break_after(module: torch.fx.GraphModule) -> BreakNote | None:
    """The break that ended a graph which Dynamo hands to a backend; None where the function ended."""
    return _break_note(getattr(module, "compile_subgraph_reason", None))


def _break_note(reason: Any) -> BreakNote | None:
    if reason is None or not reason.graph_break:
        return None
    return BreakNote(reason.reason, tuple((f.filename, f.lineno or 0) for f in reason.user_stack))


class BreakNotes:
    """What Dynamo notes of graph breaks, from now on. Dynamo keeps one list for the whole process, of the breaks that
    it went on behind, and one of its last 64 attempts, with the reason for those that came to nothing."""

    def __init__(self) -> None:
        from torch._dynamo import utils

        self._utils = utils
        self._attempts = -1
        self.skip()

    def skip(self) -> None:
        """Passes over what was noted so far."""
        attempts = self._utils.counters["frames"]["total"]
        if attempts != self._attempts:
            self._attempts = attempts
            self._noted = len(self._utils.graph_break_reasons)
            self._time = max((m.start_time_us or 0 for m in self._utils.get_compilation_metrics()), default=0)

    def fresh(self) -> list[BreakNote]:
        """What was noted since the last look."""
        if self._utils.counters["frames"]["total"] == self._attempts:
            return []
        reasons = self._utils.graph_break_reasons
        notes = [_break_note(r) for r in reasons[self._noted if self._noted <= len(reasons) else 0 :]]
        for attempt in self._utils.get_compilation_metrics():
            if (attempt.start_time_us or 0) > self._time and attempt.fail_reason and attempt.fail_user_frame_filename:
                where = (attempt.fail_user_frame_filename, attempt.fail_user_frame_lineno or 0)
                notes.append(BreakNote(attempt.fail_reason, (where,), attempt.co_name))
        self.skip()
        return [note for note in notes if note is not None]


def is_state_source(source: str) -> bool:
    """Whether a source names a parameter or a buffer of a module."""
    return bool(_STATE.search(source))


def qualified_name(source: str) -> str:
    """`L['self']._modules['fc']._parameters['weight']` → `fc.weight`."""
    dotted = _ATTRIBUTE.sub(r".\1", source)
    root, _, rest = dotted.partition(".")
    return rest or root


def trace(function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode) -> torch.fx.GraphModule:
    """`function` traced on fake inputs into ATen overloads before dispatch, metadata of running nodes kept."""
    with mode, torch.fx.traceback.preserve_node_meta():
        return make_fx(function, pre_dispatch=True, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)


def trace_below_transforms(
    function: Callable[..., Any], inputs: Sequence[Any], mode: FakeTensorMode
) -> torch.fx.GraphModule:
    """`function`, which opens and closes vmap or torch.func levels, traced where the dispatcher has resolved them."""
    with mode, torch.fx.traceback.preserve_node_meta():
        return make_fx(function, tracing_mode="real", _allow_non_fake_inputs=True)(*inputs)


def aot_autograd(
    module: Callable[..., Any],
    inputs: Sequence[Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    partition: Callable[..., Any] | None = None,
    around: Around | None = None,
) -> Callable[..., Any]:
    """AOTAutograd over a module whose parameters are ordinary inputs; compilers get (graph module, fake inputs).

    partition: what splits the joint graph (`compat_joint.Partition`); without it the graph is split as eager would run.
    """
    from torch._dynamo.backends.common import aot_autograd as dynamo_aot_autograd

    given = {} if partition is None else {"partition_fn": partition}

    def without_leftovers(graph_module: torch.fx.GraphModule, fakes: Sequence[Any]) -> Callable[..., Any]:
        drop_unused(graph_module)
        return backward(graph_module, fakes)

    compilers = (boxed(c, around and around(w)) for c, w in ((forward, "forward"), (without_leftovers, "backward")))
    compiler = dynamo_aot_autograd(**dict(zip(("fw_compiler", "bw_compiler"), compilers)), **given)
    return compiler(module, [_of_known_size(value) for value in inputs])


def drop_unused(module: torch.fx.GraphModule) -> None:
    """Drops calls that only compute a result that nobody reads. PyTorch's partitioner leaves those in the backward
    graph that may draw random numbers: attention would run forward once more."""

    def has_effect(node: torch.fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return node.is_impure() if schema is None or schema.is_mutable else False

    module.graph.eliminate_dead_code(has_effect)
    module.recompile()


def _of_known_size(value: Any) -> Any:
    """A tensor that Dynamo has not seen (a weight computed from parameters) as a fake whose sizes are numbers: as
    symbols they would have no source that a guard could name."""
    context = torch._guards.TracingContext.try_get()
    if context is None or context.fake_mode is None or not isinstance(value, torch.Tensor):
        return value
    if isinstance(value, FakeTensor) or value in context.tensor_to_context:
        return value
    return context.fake_mode.from_tensor(value, static_shapes=True)


def inductor(module: torch.fx.GraphModule, inputs: Sequence[Any], recompute: bool = False) -> Callable[..., Any]:
    """The graph compiled by Inductor as a backend would; inputs as Dynamo gave them.

    recompute: backward may make a product's factor again by pointwise operations; PyTorch's rules save it.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    with config.patch(ban_recompute_materialized_backward=False) if recompute else contextlib.nullcontext():
        return compile_fx(module, list(inputs))


def fresh_copies(values: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Copies of fake tensors and symbolic numbers in a mode of their own: the same shapes and strides, over symbols
    whose guards nobody else sees."""
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
    known: dict[Any, Any] = {}

    def size(value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        for symbol in value.node.expr.free_symbols - known.keys():
            hint = value.node.shape_env.backed_var_to_val if hasattr(value.node.shape_env, "backed_var_to_val") else {}
            real = torch.empty(max(int(hint.get(symbol, 8192)), 2), device="meta")
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            known[symbol] = mode.from_tensor(real, symbolic_context=context).shape[0]
        return sympy_interp(PythonReferenceAnalysis, known, value.node.expr)

    copies: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            shape, strides = [*map(size, value.shape)], [*map(size, value.stride())]
            with mode:
                copies.append(torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device))
        else:
            copies.append(size(value))
    return mode, copies


def guarded(mode: FakeTensorMode, inputs: Sequence[Any]) -> Callable[[Sequence[Any]], bool] | None:
    """What a compilation took for granted of its symbolic inputs, as a test of real ones; None where nothing."""
    env = mode.shape_env
    text = env.produce_guards_expression(inputs) if env is not None else None
    return None if text is None else lambda real: bool(env.evaluate_guards_expression(text, real))  # type: ignore[union-attr]


def inductor_region(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A graph in plain ATen, traced on these fake inputs, compiled by Inductor apart from any capture under way."""
    from torch._inductor import standalone_compile

    with torch.inference_mode(False), torch.no_grad():
        return standalone_compile(module, list(inputs), dynamic_shapes="from_graph")


def may_return_an_input(target: Any) -> bool:
    """Whether a call's result may lie in an argument's memory: a view, a write in place, or an op that is made of
    others and not known to give new memory."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return True
    if any(result.alias_info is not None for result in schema.returns):
        return True
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")
    return composite and target._opname not in _ALWAYS_NEW


@contextlib.contextmanager
def real_tensors() -> Iterator[None]:
    """Computes real tensors inside a backend, where a fake mode is active."""
    from torch.utils._python_dispatch import _disable_current_modes

    with torch.no_grad(), _disable_current_modes():
        yield


def storages(value: Any) -> tuple[int, ...]:
    """What tells the storages of a value's tensors apart, fake ones too: two tensors with one in common are aliases."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
    return tuple(t.untyped_storage()._cdata for t in tensors if t.layout is torch.strided)


def size_hint(value: Any, fallback: int = 8192) -> int:
    """A number for a possibly symbolic size: its hint, or `fallback`."""
    if isinstance(value, int):
        return value
    hint = getattr(getattr(value, "node", None), "hint", None)
    return int(hint) if hint is not None else fallback


def symbolic_expression(value: Any) -> Any:
    """The sympy expression behind a SymInt, an int otherwise."""
    return value.node.expr if isinstance(value, torch.SymInt) else value


def known_size(value: Any) -> int | None:
    """A size as a number; None for a symbol that nothing has fixed."""
    expression = symbolic_expression(value)
    return int(expression) if isinstance(expression, int) or expression.is_number else None


@contextlib.contextmanager
def fresh_size_records() -> Iterator[None]:
    """Dynamo starts without the sizes and numbers that it saw in earlier calls, and has them back afterwards, as well
    as its limit (`own_recompilations`)."""
    from torch._dynamo import config
    from torch._dynamo.pgo import get_code_state

    state, limit = get_code_state(), config.recompile_limit
    kept = dict(state)
    state.clear()
    try:
        yield
    finally:
        state.clear()
        state.update(kept)
        config.recompile_limit = limit
