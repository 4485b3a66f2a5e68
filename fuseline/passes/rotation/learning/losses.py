"""What a changed program costs on a batch, as one number that gradients flow through."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from ....compiler.errors import UserError
from ....compiler.program import Program
from ...quantize_sites import heads


class Loss(enum.Enum):
    """What to learn and choose by."""

    AUTO = "auto"  # divergence for a model with logits, error for others
    DIVERGENCE = "divergence"  # KL(as it was ‖ changed) of the logits, in nats a position
    NEXT_TOKEN = "next-token"  # cross-entropy of the next id, in nats
    ERROR = "error"  # Σ|Δ|² / Σ|reference|² over all results


@dataclass(frozen=True)
class Criterion:
    """name; call: flat inputs, results as they were, results changed → the loss; compares: reads the former results."""

    name: str
    call: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], torch.Tensor]
    compares: bool = True

    def __call__(self, inputs: Sequence[Any], before: Sequence[Any], after: Sequence[Any]) -> torch.Tensor:
        return self.call(inputs, before, after)


def criterion(loss: Loss, program: Program) -> Criterion:
    """The loss, for a program.

    Raises:
        UserError: the program has no logits, or no ids, that the loss could be taken from.
    """
    position = logits_position(program)
    if loss is Loss.AUTO:
        loss = Loss.ERROR if position is None else Loss.DIVERGENCE
    if loss is Loss.ERROR:
        return Criterion(loss.value, lambda inputs, before, after: _error(before, after))
    if position is None:
        raise UserError(
            f"loss={loss.value} is taken from logits over a vocabulary, and this program returns none",
            ["no result is a product with as many rows as an embedding of the program"],
            "loss=error compares the results as they are",
        )
    if loss is Loss.DIVERGENCE:
        return Criterion(loss.value, lambda inputs, before, after: _divergence(before[position], after[position]))
    ids = _ids(program)
    if ids is None:
        raise UserError("loss=next-token needs the ids, and no input is what an embedding looks up", remedy="loss=auto")
    return Criterion(
        loss.value, lambda inputs, before, after: _next_token(inputs[ids], after[position]), compares=False
    )


def _error(before: Sequence[Any], after: Sequence[Any]) -> torch.Tensor:
    pairs = [
        (b, a) for b, a in zip(before, after, strict=True) if isinstance(b, torch.Tensor) and b.is_floating_point()
    ]
    gaps = torch.stack([(a.float() - b.float()).square().sum() for b, a in pairs]).sum()
    return gaps / torch.stack([b.float().square().sum() for b, _ in pairs]).sum().clamp_min(1e-30)


def _divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    p, q = (F.log_softmax(x.float().flatten(0, -2), -1) for x in (before, after))
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def _next_token(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[..., :-1, :].float().flatten(0, -2), ids[..., 1:].flatten())


def logits_position(program: Program) -> int | None:
    """The position among the results of what a head over a vocabulary gives."""
    sizes = {head.meta["val"].shape[-1] for head in heads(program)}
    results = next(iter(reversed(program.graph.nodes))).args[0]
    for position, result in enumerate(results if isinstance(results, (list, tuple)) else (results,)):
        value = result.meta.get("val") if isinstance(result, Node) else None
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[-1] in sizes:
            return position
    return None


def _ids(program: Program) -> int | None:
    """The position among the caller's flat arguments of the ids that an embedding looks up."""
    inputs = dict(zip(program.placeholders, program.arguments, strict=True))
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[1] in inputs:
            return inputs[node.args[1]]
    return None
