"""Training text without data: what the model itself says."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ..compiler.errors import UserError
from ..compiler.progress import steps


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    count: int,
    length: int,
    *,
    greedy: Sequence[int] = (3, 4, 5),
    first: torch.Tensor | None = None,
    temperature: float = 1.0,
    batch: int = 64,
    seed: int = 0,
) -> torch.Tensor:
    """Sequences that a language model makes from single first tokens: ids int64 [count, length] on its device.

    The first few tokens are the most probable ones, the others are drawn: greedy text alone repeats itself, text that
    is drawn from its start on says too little that is true. Source: LLM-QAT (Liu et al., 2023, section 2.1), whose
    code takes sequences of 3, 4 and 5 greedy tokens in turn, the first one included.

    Args:
        model: called with ids [batch, n]; gives logits [batch, n, vocabulary], or an object with `logits`. Where its
            forward takes `past_key_values`, keys and values are kept between calls.
        greedy: tokens until drawing begins, a choice for one batch each, in turn.
        first: ids [count] to begin with; by default 0, 1, 2, … up to the vocabulary, and again.
        temperature: of what is drawn.
    """
    if count < 1 or length < 2 or not greedy or temperature <= 0:
        raise UserError(
            f"generate makes count >= 1 sequences of length >= 2, not {count} of {length}, at a temperature above 0"
        )
    device = next(model.parameters()).device
    source = torch.Generator(device).manual_seed(seed)
    was = model.training
    model.eval()
    try:
        if first is None:
            first = (
                torch.arange(count, device=device)
                % _Reader(model)(torch.zeros(1, 1, dtype=torch.int64, device=device)).shape[-1]
            )
        made = []
        for number, begin in enumerate(steps(first.to(device).split(batch), "generating text")):
            made.append(_sequences(_Reader(model), begin, length, greedy[number % len(greedy)], temperature, source))
    finally:
        model.train(was)
    return torch.cat(made)


def _sequences(
    reader: _Reader, begin: torch.Tensor, length: int, greedy: int, temperature: float, source: torch.Generator
) -> torch.Tensor:
    ids = begin.view(-1, 1)
    while ids.shape[1] < length:
        logits = reader(ids)[:, -1].float()
        if ids.shape[1] < greedy:
            chosen = logits.argmax(-1, keepdim=True)
        else:
            chosen = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=source)
        ids = torch.cat((ids, chosen), 1)
    return ids


class _Reader:
    """Logits of the last tokens of growing sequences; a model that keeps a cache reads only what is new."""

    def __init__(self, model: torch.nn.Module):
        self.model, self.past, self.read = model, None, 0
        self.caches = "past_key_values" in inspect.signature(model.forward).parameters

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.caches:
            found: Any = self.model(ids)
        else:
            found = self.model(ids[:, self.read :], past_key_values=self.past, use_cache=True)
            self.past, self.read = found.past_key_values, ids.shape[1]
        logits: torch.Tensor = found if isinstance(found, torch.Tensor) else found.logits
        return logits
