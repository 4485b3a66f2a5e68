"""Dropping originals: what `fuseline.optimize(…, keep_originals=False)` does to a model, and what it refuses then.

A parameter that every graph of the model reads only quantized or folded is dropped at the end of the call that compiled
the graph: it becomes a stand-in (`compiler/weights.py`). Dynamo guards the strides of parameters and a stand-in's are
0, so a graph that was compiled before the drop is compiled once more when it is called again; later ones are not.

What would hand out, copy or convert values that are gone is refused from then on, in the model's own methods
(`_Dropped`) and by hooks on the modules that own a dropped parameter.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .compile import Compilation
from .compiler.binder import refresh
from .compiler.errors import UserError
from .compiler.reads import derived_reads, plain_reads
from .compiler.weights import STORE, stand_in

_METHODS = ("train", "_apply", "__reduce_ex__")
_hooked: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def dropped(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters of `model` whose values were dropped, by name, each once."""
    return {name: p for name, p in model.named_parameters() if STORE.dropped(p)}


def drop_originals(model: torch.nn.Module, compilations: Iterable[Compilation]) -> None:
    """Drops the parameters that these graphs read only inside derived expressions."""
    plain: set[int] = set()
    derived: set[int] = set()
    for compilation in compilations:
        program = compilation.program
        plain |= {id(tensor) for tensor in plain_reads(program).values()}
        names = {name for expression in derived_reads(program) for name in expression.parameters()}
        derived |= {id(program.sources[name].tensor) for name in names}
    going = [p for p in model.parameters() if id(p) in derived - plain and not STORE.dropped(p) and _droppable(p)]
    STORE.drop(going)
    guard(model)


def _droppable(parameter: torch.nn.Parameter) -> bool:
    ordinary = type(parameter) is torch.nn.Parameter and type(parameter.data) is torch.Tensor
    return ordinary and parameter.is_floating_point() and parameter.numel() > 1


def guard(model: torch.nn.Module) -> None:
    """Has `model` refuse what a dropped parameter makes impossible; nothing, where none is dropped."""
    if not dropped(model):
        return
    for name in _METHODS:
        setattr(model, name, types.MethodType(getattr(_Dropped, name), model))
    for module in model.modules():
        owns = any(STORE.dropped(p) for p in module.parameters(recurse=False))
        if module not in _hooked and (owns or module is model):
            _hooked.add(module)
            module.register_state_dict_pre_hook(_no_state_dict)
            module.register_load_state_dict_pre_hook(_no_copy_into)  # of the model: before anything is copied
            if owns and (type(module).forward.__module__ or "").startswith("torch."):
                module.register_forward_pre_hook(_no_eager_call)


class _Dropped(torch.nn.Module):
    """Methods of a model with dropped parameters, bound to it in the place of its class's."""

    def train(self, mode: bool = True) -> torch.nn.Module:
        if mode and (gone := dropped(self)):
            raise _refusal(gone, "be trained", "optimize the original model without keep_originals=False to train it")
        return type(self).train(self, mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> torch.nn.Module:
        """`to()`, `half()`, `cuda()` and the like all end here. Moving is fine: what was derived moves along."""
        gone = dropped(self)
        for name, parameter in gone.items():
            probe = fn(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
            if probe.dtype != parameter.dtype or probe.device.type == "meta":
                goal = "moved to the device 'meta'" if probe.device.type == "meta" else f"converted to {probe.dtype}"
                remedy = "convert the original model before fuseline.optimize; model.to(device) does work"
                raise _refusal({name: parameter, **gone}, f"be {goal}", remedy)
        shapes = {name: p.shape for name, p in gone.items()}
        derived = STORE.held(list(gone.values()))
        for parameter in gone.values():
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)  # nothing to convert
        try:
            type(self)._apply(self, fn, recurse)
        finally:
            moved = {id(p): self.get_parameter(name) for name, p in gone.items()}
            for name, parameter in gone.items():
                new = moved[id(parameter)]
                new.data = stand_in(shapes[name], new.dtype, new.device)
            STORE.drop(moved.values())
            while derived:
                expression, tensors, value = derived.pop()
                over = [moved.get(id(t), t) for t in tensors]
                STORE.adopt(expression, over, value.to(over[0].device))
            refresh()
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What copy.copy, copy.deepcopy and pickling call."""
        if gone := dropped(self):
            remedy = "fuseline.save(model, path), and fuseline.load(path) for each copy"
            raise _refusal(gone, "be copied or pickled", remedy)
        for name in _METHODS:  # every parameter has values again: the model is an ordinary one
            self.__dict__.pop(name, None)
        return self.__reduce_ex__(protocol)


def _refusal(gone: dict[str, Any], what: str, remedy: str) -> UserError:
    name = next(iter(gone))
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return UserError(
        f"this model cannot {what}: the values of '{name}'{more} were dropped (keep_originals=False)", remedy=remedy
    )


def _gone_in(module: torch.nn.Module, prefix: str = "") -> dict[str, Any]:
    return {prefix + name: parameter for name, parameter in dropped(module).items()}


def _no_state_dict(module: torch.nn.Module, prefix: str, keep_vars: bool) -> None:
    if gone := _gone_in(module, prefix):
        raise _refusal(gone, "give a state_dict()", "fuseline.save(model, path), and fuseline.load(path)")


def _no_copy_into(module: torch.nn.Module, state: Any, prefix: str, metadata: dict[str, Any], *lists: Any) -> None:
    if metadata.get("assign_to_params_buffers"):
        return  # the dropped parameters are replaced by others
    if gone := _gone_in(module, prefix):
        remedy = "model.load_state_dict(state, assign=True), which replaces the parameters"
        raise _refusal(gone, "take a state_dict in place", remedy)


def _no_eager_call(module: torch.nn.Module, inputs: Any) -> None:
    """A module of PyTorch's own reads its weight as it is, unless it is being traced into a graph."""
    if torch.compiler.is_compiling():
        return
    if gone := _gone_in(module):
        raise _refusal(
            gone,
            f"run {type(module).__name__} outside of a compiled graph",
            "call the model itself; a graph break, or Dynamo's recompile limit, also leads here",
        )
