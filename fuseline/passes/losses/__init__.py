"""Fuse a model's head with its loss, so that logits of the whole vocabulary are never stored: `fuse-loss`.

Before                                             after  fuse-loss
    logits = linear(h, W)         [N, V]               loss = linear_cross_entropy(h, W, None, labels, None)
    loss = cross_entropy(logits.float(), labels)

At 32K tokens and a vocabulary of 128K, logits are 8 GB in bfloat16, and training stores a copy in float32 and gradients
of both. The op goes over the rows some at a time, 512 MB of logits (`chunk`: so many rows), and computes gradients in
the same pass: `fuseline::linear_cross_entropy`.

Between linear and loss may lie casts, a scale, a soft cap, and whatever only moves rows (the shift by one). The loss
may be a mean, a sum or one number a token, with an `ignore_index`, label smoothing or class weights (not both),
`cross_entropy` or `nll_loss` of `log_softmax`. What is divided by a count of tokens afterwards stays as it is.

Logits that the model also returns are the caller's. In training they come back as a tensor that computes itself when
something reads its elements, from the hidden states, with gradients (`logits=deferred`): a loop that reads the loss
alone never pays for them. It is refused after a parameter was edited, as the logits would be of another model. With
`logits=kept`, in inference, and where Dynamo goes on behind a graph break, such a site is refused instead. Refused too
are logits that anything else reads, and vocabularies below `least`, where storing the logits is cheaper.

Exact: loss and gradients agree with PyTorch's to 1e-12 in float64. With 16-bit weights gradients are summed in float32
and rounded once; in float16 the gradient of the logits is stored multiplied by a power of two, with or without a
GradScaler. Source: Hsu et al., 2024, "Liger Kernel", section 3.2; Wijmans et al., 2024, "Cut Your Losses in
Large-Vocabulary Language Models".
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from ...compiler.framework import Pass, Tier
from ...compiler.program import Program
from ...compiler.registry import register
from ...compiler.rule import Rule
from .rule import LinearCrossEntropy


class Logits(enum.Enum):
    DEFERRED = "deferred"
    KEPT = "kept"


@register
@dataclass(frozen=True, kw_only=True)
class FuseLoss(Pass):
    """Fuses a linear layer with the cross-entropy of its result."""

    name = "fuse-loss"
    tier = Tier.EXACT
    trial = "python benchmarks/long_context.py --device cpu --tiny"

    logits: Logits = Logits.DEFERRED  # what becomes of logits that the model returns
    least: int = 4096  # vocabularies below stay as they are
    chunk: int = 0  # rows at a time; 0: as many as make 512 MB of logits

    def rules(self, program: Program) -> Iterable[Rule]:
        yield LinearCrossEntropy(program, self.logits is Logits.DEFERRED, self.least, self.chunk)

    def nothing_matched(self, program: Program) -> tuple[str, ...]:
        return ("the program computes no cross-entropy of a linear layer's result",)
