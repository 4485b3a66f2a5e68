"""The ways into normal form: Dynamo's graph in a backend, `torch.export` for a module or a file, any FX graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from . import compat
from .errors import CaptureError
from .graph_breaks import read
from .normalize import normalize
from .program import Program, Source
from .provenance import is_ours

AROUND: list[Callable[[torch.nn.Module], AbstractContextManager[None]]] = []
"""What `capture` does around the export of a module."""


def from_dynamo(module: GraphModule, inputs: Sequence[Any]) -> Program:
    """The graph that Dynamo hands to a backend, with its example inputs (real parameters, SymInts)."""
    mode, fakes = compat.dynamo_fake_inputs(inputs)
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    states: dict[int, Source] = {}
    names: dict[int, str] = {}
    taken: set[str] = set()
    for position, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        source = compat.dynamo_source(node)
        is_state = isinstance(value, torch.nn.Parameter) or compat.is_state_source(source)
        if isinstance(value, torch.Tensor) and is_state:
            name = compat.qualified_name(source) if source else node.name
            if name in taken:  # two modules in one graph, each the root of its own names
                name = node.name
            taken.add(name)
            states[position] = Source(name, position, value, value.requires_grad)
        else:
            names[position] = node.name
    training = is_training(inputs)
    program = normalize(module, fakes, mode, states, names=names, training=training, examples=list(inputs))
    note = compat.break_after(module)
    program.ends_at = str(read(note)) if note is not None else None
    return program


def is_training(inputs: Sequence[Any]) -> bool:
    """Whether gradients are wanted through a graph with these inputs."""
    return torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in inputs)


def capture(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic: Any = None,
) -> Program:
    """One program from a module and example inputs, through `torch.export`.

    Args:
        args, kwargs: example inputs; keyword arguments that are not tensors are kept as constants.
        dynamic: `dynamic_shapes` of `torch.export.export`; None makes every size static.

    Raises:
        CaptureError: naming the line that could not be traced and what to change.
    """
    kwargs = dict(kwargs or {})
    try:
        with torch.no_grad(), contextlib.ExitStack() as around:
            for prepared in AROUND:
                around.enter_context(prepared(model))
            exported = torch.export.export(model, tuple(args), kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise _cannot_capture(model, error) from error
    owners = {name: _owner(model, name) for name, _ in _named_state(model)}
    return from_exported(exported, owners, (tuple(args), kwargs))


def _cannot_capture(model: torch.nn.Module, error: Exception) -> CaptureError:
    """Which line of the user's code stopped the capture, and the usual ways out."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if not is_ours(f.filename)]
    where = [f"at {theirs[-1].filename}:{theirs[-1].lineno}: {theirs[-1].line}"] if theirs else []
    message = [line for line in str(error).splitlines() if line.strip()][:3]
    return CaptureError(
        f"{type(model).__name__} cannot be captured as one graph: {type(error).__name__}",
        [*where, *message],
        "replace the data-dependent branch by torch.where, or keep the tensor instead of its .item(), on that line",
    )


def from_exported(
    exported: torch.export.ExportedProgram,
    owners: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    examples: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
) -> Program:
    """A program from an exported one (a `.pt2` file); parameters are looked up through `owners` at each call."""
    signature = exported.graph_signature
    graph_module = exported.graph_module
    placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    tensors = {**exported.state_dict, **exported.constants}
    lookup = dict(owners or {})
    state_names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = dict(signature.inputs_to_lifted_tensor_constants)
    state_names.update(constants)
    states: dict[int, Source] = {}
    names: dict[int, str] = {}
    values: list[Any] = []
    for position, node in enumerate(placeholders):
        values.append(node.meta["val"])
        if node.name in state_names:
            name = state_names[node.name]
            tensor = lookup[name]() if name in lookup else tensors[name]
            states[position] = Source(name, position, tensor, tensor.requires_grad, node.name in constants)
        else:
            names[position] = node.name
    if signature.buffers_to_mutate:
        raise CaptureError(
            f"buffer '{next(iter(signature.buffers_to_mutate.values()))}' is written during forward",
            ["an exported program returns the new value instead of writing it"],
            "call model.eval(), or compile with model.compile(backend='fuseline'), which keeps writes in place",
        )
    inputs = examples if examples is not None else exported.example_inputs
    flat_inputs = pytree.tree_leaves(inputs) if inputs is not None else None
    in_spec, out_spec = exported.call_spec.in_spec, exported.call_spec.out_spec

    def with_live_state(flat_user: Sequence[Any]) -> list[Any]:
        user = iter(flat_user)
        return [
            (lookup[states[i].name]() if states[i].name in lookup else states[i].tensor) if i in states else next(user)
            for i in range(len(placeholders))
        ]

    mode = next((v.fake_mode for v in values if isinstance(v, torch._subclasses.FakeTensor)), None)
    program = normalize(
        graph_module,
        values,
        mode or FakeTensorMode(shape_env=ShapeEnv()),
        states,
        names=names,
        training=False,
        examples=with_live_state(flat_inputs) if flat_inputs is not None else None,
    )
    program.call = lambda run: CapturedModule(run, in_spec, out_spec, with_live_state)
    return program


class CapturedModule(torch.nn.Module):
    """A program behind the signature of the module it was captured from."""

    def __init__(self, run: Callable[..., Any], in_spec: Any, out_spec: Any, arguments: Callable[..., list[Any]]):
        super().__init__()
        self._run, self._in_spec, self._out_spec, self._arguments = run, in_spec, out_spec, arguments

    def arguments(self, *args: Any, **kwargs: Any) -> list[Any]:
        """The program's flat arguments for a call like the captured one, live parameters included."""
        flat, spec = pytree.tree_flatten((args, kwargs))
        if self._in_spec is not None and spec != self._in_spec:
            raise CaptureError(
                "the arguments are not laid out as at capture",
                [f"captured: {self._in_spec}", f"called:   {spec}"],
                "call with the same positional and keyword arguments",
            )
        return self._arguments(flat)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._run(*self.arguments(*args, **kwargs))
        if self._out_spec is None:
            return outputs
        return pytree.tree_unflatten(list(outputs) if isinstance(outputs, (tuple, list)) else [outputs], self._out_spec)


def from_graph_module(module: GraphModule, args: Sequence[Any]) -> Program:
    """A program from any FX graph module and flat example inputs; its `get_attr` tensors become weights."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    named = _named_state(module)
    first = {id(tensor): name for name, tensor in reversed(named)}
    tied = {name: first[id(tensor)] for name, tensor in _named_state(module, remove_duplicate=False)}
    state_names = [name for name, _ in named]
    owners = [_owner(module, name) for name in state_names]
    fakes = [mode.from_tensor(t, static_shapes=True) for _, t in named]
    fakes += [mode.from_tensor(a, static_shapes=True) if isinstance(a, torch.Tensor) else a for a in args]
    states = {i: Source(name, i, tensor, tensor.requires_grad) for i, (name, tensor) in enumerate(named)}
    inputs = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    names = {len(named) + i: name for i, name in enumerate(inputs[: len(args)])}
    training = torch.is_grad_enabled() and any(
        t.requires_grad for t in [*(t for _, t in named), *args] if isinstance(t, torch.Tensor)
    )

    def run(*flat: Any) -> Any:
        replaced = dict(zip(state_names, flat[: len(named)], strict=True))
        interpreter = _WithState(module, {name: replaced[owner] for name, owner in tied.items()})
        return interpreter.run(*flat[len(named) :])

    def with_live_state(flat_user: Sequence[Any]) -> list[Any]:
        return [*(owner() for owner in owners), *flat_user]

    program = normalize(
        module, fakes, mode, states, names=names, training=training, examples=with_live_state(args), runner=run
    )
    program.call = lambda call: CapturedModule(call, None, None, with_live_state)
    return program


class _WithState(torch.fx.Interpreter):
    """Runs a graph module with its tensors replaced, those inside submodules too."""

    def __init__(self, module: GraphModule, tensors: dict[str, torch.Tensor]):
        super().__init__(module)
        self._tensors = tensors

    def fetch_attr(self, target: str) -> Any:
        return self._tensors[target] if target in self._tensors else super().fetch_attr(target)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefix = f"{target}."
        inside = {n.removeprefix(prefix): t for n, t in self._tensors.items() if n.startswith(prefix)}
        return torch.func.functional_call(self.fetch_attr(target), inside, args, kwargs)


def _named_state(module: torch.nn.Module, remove_duplicate: bool = True) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=remove_duplicate),
        *module.named_buffers(remove_duplicate=remove_duplicate),
    ]


def _owner(module: torch.nn.Module, name: str) -> Callable[[], torch.Tensor]:
    """Reads a parameter from its module at each call, so that a replaced one is seen."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    return lambda: getattr(owner, leaf)
