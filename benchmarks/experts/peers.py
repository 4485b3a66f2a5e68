"""The same layer in transformers, compiled by Inductor: `grouped_mm` and `batched_mm`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .layer import Layer

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
LARGEST = 24e9
"""Bytes of the matrices that `batched_mm` may gather."""


class _Experts(torch.nn.Module):
    """What transformers' functions ask of a module of experts."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, implementation: str):
        super().__init__()
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

        self.num_experts, self.act_fn = gate_up.shape[0], F.silu
        self.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = torch.nn.Parameter(down, requires_grad=False)
        self.function, self.gate = ALL_EXPERTS_FUNCTIONS[implementation], _default_apply_gate

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        return self.gate(self, both)  # type: ignore[no-any-return]

    def forward(self, hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self.function(self, hidden, indices, weights)  # type: ignore[no-any-return]


def peer(layer: Layer, implementation: str, weights: list[torch.Tensor], m: int) -> Call | None:
    """The compiled layer for m tokens; None where it is not at hand, or would gather more than LARGEST."""
    if importlib.util.find_spec("transformers") is None:
        return None
    if implementation == "batched_mm" and m * layer.sizes[3] * layer.expert_bytes > LARGEST:
        return None
    module = _Experts(*weights[:2], implementation)
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]
