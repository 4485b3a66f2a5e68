"""Decoders by their sizes alone, without weights: what is planned for need not be downloaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fuseline.compiler.errors import UserError, nearest
from fuseline.models.decoder import angles, rotate


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: widths, counts, and whether the embedding is the head too."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        """How many there are."""
        head = self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        block = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        return self.layers * block + self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden


SHAPES = {
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152, True),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256, True),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128256, True),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-3.1-70b": Shape(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": Shape(16384, 53248, 126, 128, 8, 128256),
}


def find_shape(spec: str) -> Shape:
    """`shape:llama-3.1-70b`, or `hf:DIR` by its config.json.

    Raises:
        UserError: there is no such shape, or the file does not give one.
    """
    kind, _, rest = spec.partition(":")
    if kind == "shape":
        if rest not in SHAPES:
            raise UserError(f"unknown shape '{rest}'{nearest(rest, SHAPES)}")
        return SHAPES[rest]
    if kind != "hf":
        raise UserError(
            f"'{spec}' names no shape", remedy="shape:llama-3.1-70b, or hf:DIR of a folder with config.json"
        )
    path = Path(rest).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        heads = int(config["num_attention_heads"])
        return Shape(
            int(config["hidden_size"]), int(config["intermediate_size"]), int(config["num_hidden_layers"]), heads,
            int(config.get("num_key_value_heads", heads)), int(config["vocab_size"]),
            bool(config.get("tie_word_embeddings", False)),
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} gives no shape of a decoder: {type(error).__name__}: {error}") from None


class Layer(nn.Module):
    """Attention and a gated feed-forward, each behind a norm; x: [B, S, hidden]."""

    def __init__(self, shape: Shape):
        super().__init__()
        width = shape.hidden // shape.heads
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.width, self.grouped = width, shape.heads != shape.kv_heads
        self.first, self.second = nn.RMSNorm(shape.hidden, eps=1e-5), nn.RMSNorm(shape.hidden, eps=1e-5)
        self.q, self.o = linear(shape.hidden, shape.heads * width), linear(shape.heads * width, shape.hidden)
        self.k, self.v = (linear(shape.hidden, shape.kv_heads * width) for _ in range(2))
        self.gate, self.up = linear(shape.hidden, shape.inner), linear(shape.hidden, shape.inner)
        self.down = linear(shape.inner, shape.hidden)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.width)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        h = self.second(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """ids [B, S] int64 → hidden states [B, S, hidden], or the mean loss of the next tokens with `loss`."""

    def __init__(self, shape: Shape, loss: bool = True):
        super().__init__()
        self.shape, self.loss = shape, loss
        self.embed = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-5)
        if loss and not shape.tied:
            self.head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        cos, sin = angles(ids.shape[1], self.shape.hidden // self.shape.heads, x)
        for layer in self.layers:
            x = layer(x, cos, sin)
        x = self.norm(x)
        if not self.loss:
            return x
        logits = F.linear(x, self.embed.weight if self.shape.tied else self.head.weight)
        targets = torch.cat((ids[:, 1:], ids.new_full((ids.shape[0], 1), -100)), 1)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
