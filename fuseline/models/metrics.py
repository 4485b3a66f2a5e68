"""How far a changed model's predictions are from the original's, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fuseline.compiler.progress import steps

Logits = Callable[[torch.Tensor], torch.Tensor]
ROWS = 64  # positions evaluated at a time in float64: 64 rows of a vocabulary of 128k are 67 MB


@dataclass(frozen=True)
class Metrics:
    """perplexity_*: exp of the mean negative log-likelihood of the next token, in nats.

    kl: mean over positions of KL(original ‖ changed), in nats. top1: share of positions whose most likely token is the
    same. tokens: positions that the means run over.
    """

    perplexity_before: float
    perplexity_after: float
    kl: float
    top1: float
    tokens: int


def compare(reference: Logits, candidate: Logits, windows: Sequence[torch.Tensor]) -> Metrics:
    """Runs both models over the windows, one at a time.

    Args:
        reference, candidate: ids int64 [1, T] → logits [1, T, V] in any floating-point dtype.
        windows: ids, each int64 [1, T] with T >= 2.

    The log-probabilities are computed in float64 from the logits as they come, so the figures add no rounding of their
    own. Perplexities run over the T - 1 positions that have a next token, KL and top-1 over all T.
    """
    if not windows:
        raise ValueError("no window of text to compare on")
    likelihood = torch.zeros(2, dtype=torch.float64)
    divergence, agreed, predicted, positions = 0.0, 0, 0, 0
    for ids in steps(windows, "comparing on held-out text"):
        before, after = reference(ids)[0], candidate(ids)[0]
        if before.shape != after.shape:
            raise ValueError(f"logits differ in shape: {list(before.shape)} and {list(after.shape)}")
        following = ids[0, 1:].to(before.device)
        for start in range(0, len(before), ROWS):
            p = F.log_softmax(before[start : start + ROWS].double(), dim=-1)
            q = F.log_softmax(after[start : start + ROWS].double(), dim=-1)
            divergence += F.kl_div(q, p, reduction="sum", log_target=True).item()
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            target = following[start : start + ROWS].unsqueeze(1)
            rows = len(target)
            likelihood += torch.stack([-p[:rows].gather(1, target).sum(), -q[:rows].gather(1, target).sum()]).cpu()
            predicted += rows
        positions += len(before)
    mean = [_exp(total / predicted) for total in likelihood.tolist()]
    return Metrics(mean[0], mean[1], divergence / positions, agreed / positions, positions)


def log_perplexity(model: Logits, windows: Sequence[torch.Tensor]) -> float:
    """The mean negative log-likelihood of the next token, in nats, of one model over the windows: see `compare`."""
    total, predicted = 0.0, 0
    for ids in steps(windows, "running on held-out text"):
        logits, following = model(ids)[0, :-1], ids[0, 1:]
        for rows, target in zip(logits.split(ROWS), following.split(ROWS), strict=True):
            total += F.cross_entropy(rows.double(), target, reduction="sum").item()
        predicted += len(following)
    if not predicted:
        raise ValueError("no window of text to predict")
    return total / predicted


def _exp(value: float) -> float:
    """exp without an OverflowError: a model that predicts nothing right has an infinite perplexity."""
    return math.exp(value) if value < 700 else math.inf
