"""Where passes keep what took long to compute from data and weights, so that the next analysis need not do it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch


class Results(Protocol):
    """Named tensors, found by what they were computed from. `runtime/tensor_store.py` keeps them on disk."""

    def get(self, name: str, fields: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
        """The tensors, on the CPU; None where they have to be computed. fields: JSON data, all that they depend on."""

    def put(self, name: str, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Keeps them, where that can be done."""
