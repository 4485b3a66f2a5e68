"""Everything that rests on a private PyTorch API, in one place.

Checked with torch 2.11.0 and 2.13.0. A new PyTorch version is a change to this file and to its tests, nowhere else.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

CHECKED_VERSIONS = ("2.11.0", "2.13.0")

_ATTRIBUTE = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]")
_STATE = re.compile(r"\._(?:parameters|buffers)\['[^']+'\]$")


def dynamo_fake_inputs(inputs: Sequence[Any]) -> tuple[FakeTensorMode, list[Any]]:
    """Fake copies of a backend's example inputs in Dynamo's own mode, so that its symbols are kept."""
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if context is None or mode is None:
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        return mode, [mode.from_tensor(x, static_shapes=True) if _is_real(x) else x for x in inputs]
    fakes = []
    for x in inputs:
        if not _is_real(x):
            fakes.append(x)
            continue
        symbols = context.tensor_to_context.get(x)
        source = symbols.tensor_source if symbols is not None else None
        fakes.append(mode.from_tensor(x, static_shapes=symbols is None, symbolic_context=symbols, source=source))
    return mode, fakes


def _is_real(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)


def dynamo_source(node: torch.fx.Node) -> str:
    """Where Dynamo found a placeholder, e.g. `L['self']._modules['fc']._parameters['weight']`; "" if unknown."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", None)
    return str(name() if callable(name) else name or "")


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


def aot_autograd(
    module: Callable[..., Any], inputs: Sequence[Any], forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """AOTAutograd over a module whose parameters are ordinary inputs; compilers get (graph module, fake inputs)."""
    from torch._dynamo.backends.common import aot_autograd as dynamo_aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    def boxed(compiler: Callable[..., Any]) -> Callable[..., Any]:
        return lambda graph_module, fakes: make_boxed_func(compiler(graph_module, fakes))

    return dynamo_aot_autograd(fw_compiler=boxed(forward), bw_compiler=boxed(backward))(module, list(inputs))


def inductor(module: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph compiled by Inductor as a backend would; inputs as Dynamo gave them."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, list(inputs))


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
