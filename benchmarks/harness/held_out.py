"""A language model in float32, and the texts that it is fitted to and measured on."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fuseline.models import metrics, text
from fuseline.models.spec import load


class HeldOut:
    """The model and the held-out windows that options name; options: model, device, length, windows."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.loaded = load(options.model)
        self.original = self.loaded.model.eval().to(self.device)
        self.held_out = [ids.to(self.device) for ids in self.cut(text.evaluation_text(), options.windows)]

    def cut(self, source: str, count: int) -> list[torch.Tensor]:
        """At most `count` windows of a text, each ids [1, length]."""
        return text.windows(source, self.loaded.encode, self.options.length, count)

    @torch.no_grad()
    def log_perplexity(self, model: Any) -> float:
        """Of a model on the held-out windows, in nats."""
        return metrics.log_perplexity(lambda ids: model(ids, use_cache=False).logits, self.held_out)
