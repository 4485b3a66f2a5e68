"""Small models and comparisons that many tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

import fuseline
from fuseline.compiler.program import Program


class Mlp(torch.nn.Module):
    """A gated MLP behind an RMSNorm, with a residual: float64-clean, written out by hand."""

    def __init__(self, width: int = 8, inner: int = 16):
        super().__init__()
        self.norm = torch.nn.Parameter(torch.rand(width) + 0.5)
        self.gate = torch.nn.Linear(width, inner, bias=False)
        self.up = torch.nn.Linear(width, inner)
        self.down = torch.nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.norm
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Tied(torch.nn.Module):
    """An embedding and a head that share one parameter."""

    def __init__(self, vocabulary: int = 12, width: int = 8):
        super().__init__()
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.body = torch.nn.Linear(width, width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(self.embed(ids))))


def tiny_llama(seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random two-layer decoder of the Hugging Face library with grouped queries."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = {
        "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**settings, **changes})).eval()


def error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max|Δ| / max|reference|."""
    return ((actual - reference).abs().max() / reference.abs().max().clamp_min(1e-30)).item()


def traced(function: Callable[..., Any], *args: Any) -> Program:
    """A function as a program, through `torch.fx.symbolic_trace`, in inference."""
    with torch.no_grad():
        return Program.from_fx(torch.fx.symbolic_trace(function), args)


def ops(program: Program) -> list[str]:
    """The names of the ops in a program, without overloads; regions by their name."""
    calls = [n.target for n in program.graph.nodes if n.op.startswith("call_")]
    return [getattr(t, "_opname", None) or getattr(t, "__name__", None) or str(t) for t in calls]


@contextmanager
def registered(*kinds: type[fuseline.Pass]) -> Iterator[None]:
    """Passes that exist for the length of a test."""
    from fuseline.compiler import registry

    registry.available()  # the entry points are loaded now, so that they are not dropped below
    before = dict(registry._known)
    try:
        for kind in kinds:
            fuseline.register(kind)
        yield
    finally:
        registry._known.clear()
        registry._known.update(before)
