"""An implementation of experts for transformers, called `fuseline`: a layer's experts are one call of `fuseline::moe`.

    model.set_experts_implementation("fuseline")        by hand; `fuseline.optimize` and `fuseline.capture` do it

transformers asks `ALL_EXPERTS_FUNCTIONS` how to run the experts of a layer. Its own `eager` loops over experts that
data decides on, which no graph can hold; this takes its place there. Layers whose gated unit is none that `raise` knows
run as `batched_mm`, which is one graph too.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from fuseline.compiler.capture import from_graph_module
from fuseline.compiler.pipeline import Pipeline
from fuseline.passes.raising.experts.gate import gate_of

NAME = "fuseline"
LOOPS = ("eager", None, NAME)
"""What loops over experts, as data has it; `grouped_mm` and `batched_mm` are graphs, which `raise` reads."""

Unit = tuple[str, bool, float, float]
"""The activation of a gated unit, whether gates and ups are interleaved, and the clamped one's alpha and limit."""

_units: dict[Any, Unit | None] = {}


def register() -> None:
    """Makes the implementation known to transformers; again does nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(
    self: torch.nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [T, H], top_k_index int64 [T, K], top_k_weights [T, K] → [T, H]."""
    unit = getattr(self, "_fuseline_unit", None)
    if unit is None:
        from transformers.integrations.moe import batched_mm_experts_forward

        return batched_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    own: Any = self
    gate_up, down = own.gate_up_proj, own.down_proj
    if own.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    biases = (own.gate_up_proj_bias, own.down_proj_bias) if own.has_bias else (None, None)
    indices = top_k_index.clamp(0, own.num_experts - 1)  # those of other devices, whose weights are zero
    result: torch.Tensor = torch.ops.fuseline.moe(hidden_states, indices, top_k_weights, gate_up, down, *biases, *unit)
    return result


def use(model: torch.nn.Module) -> bool:
    """Has a model's experts run by this implementation where transformers would loop over them; whether any do."""
    layers = list(_layers(model))
    for layer in layers:
        register()
        layer._fuseline_unit = _unit(layer)
    for config in {id(layer.config): layer.config for layer in layers}.values():
        config._experts_implementation = NAME
    return bool(layers)


@contextlib.contextmanager
def used(model: torch.nn.Module) -> Iterator[None]:
    """The same inside the block alone."""
    before = {id(layer.config): (layer.config, layer.config._experts_implementation) for layer in _layers(model)}
    use(model)
    try:
        yield
    finally:
        for config, implementation in before.values():
            config._experts_implementation = implementation


def _layers(model: torch.nn.Module) -> Iterator[Any]:
    """The modules whose experts transformers loops over; none where it was never imported."""
    if "transformers" not in sys.modules:
        return
    for module in model.modules():
        parts = ("is_transposed", "has_bias", "has_gate", "_apply_gate", "config", "down_proj")
        if all(hasattr(module, part) for part in parts):
            if getattr(module.config, "_experts_implementation", NAME) in LOOPS:
                yield module


def _unit(layer: Any) -> Unit | None:
    """What `_apply_gate` of a layer computes, read from its graph; None where it is no unit that is known."""
    if not layer.has_gate or not hasattr(layer, "gate_up_proj"):
        return None
    own = (getattr(layer, name, None) for name in ("alpha", "limit"))
    key = (type(layer)._apply_gate, type(getattr(layer, "act_fn", None)), *own)
    if key not in _units:
        _units[key] = _read_unit(layer)
    return _units[key]


def _read_unit(layer: Any) -> Unit | None:
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        example = torch.zeros(3, 16)
        module = make_fx(lambda both: layer._apply_gate(both), pre_dispatch=True)(example)
        program, _ = Pipeline("raise{allow_empty}").run(from_graph_module(module, (example,)))
    output = next(node for node in program.graph.nodes if node.op == "output")
    found = gate_of(output.all_input_nodes[0])
    if found is None or found.both.op != "placeholder":
        return None
    return found.activation, found.interleaved, found.alpha, found.limit
