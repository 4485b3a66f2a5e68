"""Models that the planted faults hide in: a Llama that also notes its last logits in a tensor of the caller's."""

from __future__ import annotations

from typing import Any

import torch

import fuseline
from fuseline import Program
from fuseline.models import load
from fuseline.models.text import evaluation_text, windows


class Noting(torch.nn.Module):
    """A language model that writes the last position's logits into `notes`, as a decode loop might have it."""

    def __init__(self, model: torch.nn.Module, **arguments: Any):
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, ids: torch.Tensor, notes: torch.Tensor) -> torch.Tensor:
        logits = self.model(ids, **self.arguments).logits
        notes[0].copy_(logits[0, -1])
        return logits


def noting(spec: str, tokens: int = 32) -> Program:
    """A demonstration model as one program with a symbolic length and an input that it writes to."""
    loaded = load(spec)
    if "tiny" in spec:  # its norms are all ones, and a fault that exchanges two of them would not show
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
    ids = windows(evaluation_text(), loaded.encode, tokens, 1)[0]
    notes = torch.zeros(1, loaded.model.config.vocab_size)
    dynamic = {"ids": {1: torch.export.Dim.AUTO}, "notes": None}
    return fuseline.capture(Noting(loaded.model, **loaded.example_kwargs), (ids, notes), dynamic=dynamic)
