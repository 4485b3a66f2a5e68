"""How far a quantized model's predictions are from the original's, on the same tokens: also by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

QUARTERS = 4
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Score:
    """loss: mean negative log-likelihood of the next token, in nats; kl: mean KL(original ‖ quantized); kl_by: of each
    quarter of a window's positions, the first tokens first; top1: share of positions with the same likeliest token."""

    loss: float
    kl: float
    kl_by: tuple[float, ...]
    top1: float

    def over(self, reference: float) -> float:
        """The ratio of perplexities."""
        return math.exp(min(self.loss - reference, 700.0))


class Judge:
    """Holds the original's log-probabilities: tokens × vocabulary floats.

    original: ids [B, T] → logits [B, T, V]; batches: of ids, all of one shape.
    """

    def __init__(self, original: Logits, batches: Sequence[torch.Tensor]):
        self.batches = list(batches)
        with torch.no_grad():
            self.reference = [F.log_softmax(original(ids).float(), -1) for ids in self.batches]
        self.loss = self._loss(self.reference)

    @torch.no_grad()
    def __call__(self, model: Logits) -> Score:
        found = [F.log_softmax(model(ids).float(), -1) for ids in self.batches]
        pairs = list(zip(self.reference, found, strict=True))
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).double()
        quarters = [float(part.mean()) for part in kl.chunk(QUARTERS, dim=1)]
        agreed = torch.cat([(p.argmax(-1) == q.argmax(-1)).flatten() for p, q in pairs])
        return Score(self._loss(found), float(kl.mean()), tuple(quarters), float(agreed.double().mean()))

    def _loss(self, logs: Sequence[torch.Tensor]) -> float:
        pairs = zip(logs, self.batches, strict=True)
        picked = [q[:, :-1].gather(2, ids[:, 1:].unsqueeze(-1).to(q.device)) for q, ids in pairs]
        return -float(torch.cat(picked).double().mean())
