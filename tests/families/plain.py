"""Models in plain PyTorch: the library's own transformers, and what people write by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .rows import VOCABULARY, Row, pixels, tokens

WIDTH, HEADS = 64, 4


class Encoder(nn.Module):
    """nn.TransformerEncoder between an embedding and a head."""

    def __init__(self, norm_first: bool, causal: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 96, batch_first=True, norm_first=norm_first)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.causal = causal

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        return self.head(self.layers(self.embed(ids), mask=mask, is_causal=True if self.causal else None))


class Translator(nn.Module):
    """nn.Transformer with both of its sides embedded."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.core = nn.Transformer(WIDTH, HEADS, 2, 2, 96, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.core(self.embed(source), self.embed(target), tgt_mask=mask, tgt_is_causal=True))


class Block(nn.Module):
    """A pre-norm block as one finds it in teaching code: joint q/k/v, a mask from a buffer, softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.register_buffer("visible", torch.tril(torch.ones(64, 64)).view(1, 1, 64, 64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = lambda t: t.view(batch, length, HEADS, width // HEADS).transpose(1, 2)
        q, k, v = map(split, self.qkv(self.first(x)).split(width, dim=2))
        scores = (q @ k.transpose(-2, -1)) / (width // HEADS) ** 0.5
        scores = scores.masked_fill(self.visible[:, :, :length, :length] == 0, float("-inf"))
        mixed = (F.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Gpt(nn.Module):
    """A hand-written decoder; with `loops`, its blocks run that often, so that each is called several times."""

    def __init__(self, loops: int = 1) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.loops = loops

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for _ in range(self.loops):
            for block in self.blocks:
                x = block(x)
        return self.head(self.norm(x))


class Broken(Gpt):
    """The same with a break of the graph after each block, as a print would cause."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        x = self.blocks[1](x)
        torch._dynamo.graph_break()
        return self.head(self.norm(x))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))


def cnn() -> nn.Module:
    """Strided, grouped, dilated and 1 x 1 convolutions with batch norms."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4, bias=False), nn.BatchNorm2d(32), nn.SiLU(),
        nn.Conv2d(32, 32, 3, padding="same", dilation=2), nn.GELU(), nn.Conv2d(32, 48, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip


class Recurrent(nn.Module):
    """nn.LSTM between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.core = nn.Embedding(VOCABULARY, WIDTH), nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.core(self.embed(ids))[0])


def plain(name: str, traits: str, build: Callable[[], nn.Module], inputs: Callable[[int, int], dict[str, Any]]) -> Row:
    return Row(name, "plain PyTorch", traits, build, inputs, lambda output: output)


def ids(batch: int, seed: int) -> dict[str, Any]:
    return {"ids": tokens(batch, seed=seed)}


def masked(batch: int, seed: int) -> dict[str, Any]:
    return {**ids(batch, seed), "mask": torch.ones(12, 12, dtype=torch.bool).triu(1)}


def sides(batch: int, seed: int) -> dict[str, Any]:
    return {"source": tokens(batch, seed=seed), "target": tokens(batch, 7, seed=seed + 1000)}


PLAIN = [
    plain("nn.TransformerEncoder", "post-norm", lambda: Encoder(False, False), ids),
    plain("nn.TransformerEncoder, causal", "pre-norm, additive mask", lambda: Encoder(True, True), ids),
    plain("nn.TransformerEncoder, mask given", "PyTorch looks into the mask: a graph break, layers in eager",
          lambda: Encoder(False, False), masked),
    plain("nn.Transformer", "encoder and decoder", Translator, sides),
    plain("hand-written GPT", "mask from a buffer, softmax written out", Gpt, ids),
    plain("looped GPT", "each block called twice", lambda: Gpt(loops=2), ids),
    plain("GPT with graph breaks", "a break after each block", Broken, ids),
    plain("MLP", "linears and ReLU", mlp, lambda batch, seed: {"input": pixels(8 * batch, 32, seed=seed)}),
    plain("CNN", "strided, grouped, dilated convolutions", cnn,
          lambda batch, seed: {"input": pixels(batch, 3, 16, 16, seed=seed)}),
    plain("nn.LSTM", "recurrent", Recurrent, ids),
]  # fmt: skip
OTHERS = PLAIN
