"""A row of the family table: how to build a tiny model, what to call it with, which of its outputs are logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

VOCABULARY = 96
Inputs = Mapping[str, Any]


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    """Token ids int64 [batch, length], none of them special."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int, seed: int = 1) -> torch.Tensor:
    """Float32 noise of unit variance."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Row:
    """One model of the table.

    kind: which part of the table it belongs to. traits: what sets the family apart, in a few words. build: the model,
    its weights still as its constructor drew them. inputs: keyword arguments of a forward, from (batch, seed). logits:
    the output whose distribution over the last dimension the KL divergence is taken of. smooth: the model without its
    discrete choices, where it has some, for comparing two roundings: a token whose experts change outweighs all others.
    """

    name: str
    kind: str
    traits: str
    build: Callable[[], torch.nn.Module] = field(repr=False)
    inputs: Callable[[int, int], Inputs] = field(repr=False)
    logits: Callable[[Any], torch.Tensor] = field(default=lambda output: output.logits, repr=False)
    smooth: Callable[[], torch.nn.Module] | None = field(default=None, repr=False)

    def model(self, seed: int = 0, smooth: bool = False) -> torch.nn.Module:
        """The model in evaluation, with weights of `seed` that make its logits spread (see `draw`)."""
        torch.manual_seed(0)
        model = (self.smooth if smooth and self.smooth else self.build)().eval()
        jitter(model)
        draw(model, seed)
        return model


@torch.no_grad()
def draw(model: torch.nn.Module, seed: int) -> None:
    """Draws every matrix anew, in place: N(0, 1/fan-in), embeddings N(0, 4/width).

    Initial weights of the usual 0.02 give logits so near to uniform that any quantization has a KL of zero. With these,
    logits have a standard deviation of about 1 to 2 at any width. Tied weights are drawn once.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen and _is_matrix(module, parameter):
                seen.add(id(parameter))
                parameter.normal_(0, _deviation(module, parameter), generator=generator)


@torch.no_grad()
def jitter(model: torch.nn.Module) -> None:
    """Moves biases and norm weights off the constants (0 or 1) that they start at, which would hide a wrong one."""
    generator = torch.Generator().manual_seed(7)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if (
                not _is_matrix(module, parameter)
                and parameter.numel()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
        for name, buffer in module.named_buffers(recurse=False):
            if name in ("running_mean", "running_var"):
                buffer.add_(torch.empty_like(buffer).uniform_(0, 0.5, generator=generator))


def _is_matrix(module: torch.nn.Module, parameter: torch.Tensor) -> bool:
    """Parameters that multiply or look up; others of two dimensions (a state-space model's decay) keep their values."""
    known = isinstance(module, (torch.nn.Linear, torch.nn.Embedding, torch.nn.modules.conv._ConvNd))
    return parameter.dim() >= 2 and (
        known or parameter.dim() == 3 or type(module).__name__ in ("Conv1D", "MultiheadAttention")
    )


def _deviation(module: torch.nn.Module, parameter: torch.Tensor) -> float:
    if isinstance(module, torch.nn.Embedding):
        return 2 / math.sqrt(parameter.shape[1])
    if isinstance(module, torch.nn.modules.conv._ConvNd):
        return 1 / math.sqrt(parameter[0].numel())
    if type(module).__name__ == "Conv1D":  # transformers' linear with a transposed weight
        return 1 / math.sqrt(parameter.shape[0])
    return 1 / math.sqrt(parameter.shape[-1])
