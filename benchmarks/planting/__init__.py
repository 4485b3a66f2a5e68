"""Outlier channels planted exactly into a Llama: the function stays the same, what is quantized gets harder.

Each kind scales a channel where a module writes it and scales it back where the next one reads it. With a power of two
as the factor no bit of a result changes, as long as nothing overflows.

inner   rows of the up projection, columns of the down projection: the input of the latter
values  rows of the value projection, columns of the output projection for every query head of the group
keys    a pair of channels that the rotary embedding turns into each other, up in the keys and down in the queries
norms   the scale of a norm, columns of all that read it: what the norm returns
stream  a reflection that carries a direction of the residual stream into one channel, folded into all that writes the
        stream and, with the norms' scales, into all that reads it

No scaling pair plants an outlier in the residual stream itself: a norm divides by the mean over all channels, which one
larger channel changes for every token differently. A reflection leaves that mean as it is, and so is exact, up to
rounding. It needs a head of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

KINDS = ("inner", "values", "keys", "norms", "stream")


@torch.no_grad()
def plant(model: Any, pairs: Iterable[tuple[str, float]], channels: int, seed: int = 0) -> None:
    """Plants in place, the same number of channels in every layer, drawn from `seed`.

    Args:
        model: a LlamaForCausalLM.
        pairs: a kind, and by how much its channels are scaled where they are written: powers of two, so that it is
            exact. Below one, it is the weights that read them which get the outliers. The stream has no factor: see
            `reflect`.
        channels: how many of the inner channels; of the norms' as many; one of each head of the keys and values.
    """
    draw = torch.Generator().manual_seed(seed)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for kind, factor in pairs:
            if kind == "inner":
                _pair([mlp.up_proj], [mlp.down_proj], _draw(mlp.up_proj.out_features, channels, draw), factor)
            elif kind == "values":
                _values(attention, _draw(attention.head_dim, 1, draw), factor)
            elif kind == "keys":
                _keys(attention, _draw(attention.head_dim // 2, 1, draw), factor)
            elif kind == "norms":
                for norm, readers in _norms(layer):
                    chosen = _draw(norm.weight.numel(), channels, draw)
                    norm.weight[chosen] *= factor
                    _pair([], readers, chosen, factor)
            else:
                raise ValueError(f"{kind} is none of {', '.join(KINDS[:-1])}")


def _draw(size: int, count: int, draw: torch.Generator) -> torch.Tensor:
    return torch.randperm(size, generator=draw)[:count]


def _pair(writers: list[nn.Linear], readers: list[nn.Linear], channels: torch.Tensor, factor: float) -> None:
    for writer in writers:
        writer.weight[channels] *= factor
        if writer.bias is not None:
            writer.bias[channels] *= factor
    for reader in readers:
        reader.weight[:, channels] /= factor


def _values(attention: Any, channels: torch.Tensor, factor: float) -> None:
    """Those channels of every head: a query head reads the values of its group, so all of the group are scaled back."""
    size = attention.head_dim
    heads = torch.arange(attention.v_proj.out_features // size)
    readers = torch.arange(attention.o_proj.in_features // size)
    _pair([attention.v_proj], [], (heads[:, None] * size + channels).flatten(), factor)
    _pair([], [attention.o_proj], (readers[:, None] * size + channels).flatten(), factor)


def _keys(attention: Any, channels: torch.Tensor, factor: float) -> None:
    """The rotary embedding turns channel i with channel i + half: scaled alike, the two commute with it."""
    size = attention.head_dim
    both = torch.cat([channels, channels + size // 2])
    for linear, scale in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
        heads = torch.arange(linear.out_features // size)
        _pair([linear], [], (heads[:, None] * size + both).flatten(), scale)


def _norms(layer: Any) -> Iterator[tuple[Any, list[nn.Linear]]]:
    attention, mlp = layer.self_attn, layer.mlp
    yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
    yield layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]


@torch.no_grad()
def reflect(model: Any, direction: torch.Tensor | None, channel: int = 0) -> None:
    """Carries `direction` [width] of the residual stream into one channel, in place; None folds the norms' scales only.

    The reflection is H = I − 2·v·vᵀ with v along direction − e (Householder, 1958), folded in float64. The head gets
    a table of its own and the norms are left without scales, so the reference is a model that was given None.
    """
    body = model.model
    if model.lm_head.weight is body.embed_tokens.weight:
        model.lm_head.weight = nn.Parameter(body.embed_tokens.weight.detach().clone())
        model.config.tie_word_embeddings = False
    groups = [*(group for layer in body.layers for group in _norms(layer)), (body.norm, [model.lm_head])]
    for norm, readers in groups:
        for reader in readers:
            _turned(reader.weight, direction, channel, norm.weight)
        norm.weight.fill_(1)
    _turned(body.embed_tokens.weight, direction, channel)
    for layer in body.layers:
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            _turned(writer.weight.T, direction, channel)


def _turned(table: torch.Tensor, direction: torch.Tensor | None, channel: int, scale: Any = None) -> None:
    """table [n, width] times the scales times H, written back in its own dtype."""
    wide = table.double() if scale is None else table.double() * scale.double()
    if direction is not None:
        normal = direction.double() / direction.double().norm()
        normal[channel] -= 1
        normal /= normal.norm()
        wide = wide - 2 * (wide @ normal)[:, None] * normal
    table.copy_(wide)


class Spread:
    """How heavy the tails of what the products read are: the share of the largest channel, and the kurtosis.

    Used as a context: it hooks every linear of the model but its head, and keys and values by their projections.
    """

    def __init__(self, model: Any):
        self.model, self.seen = model, {}
        self.hooks: list[Any] = []

    def __enter__(self) -> Spread:
        for name, module in self.model.model.named_modules():
            if isinstance(module, nn.Linear):
                kind = name.rpartition(".")[2]
                self.hooks.append(module.register_forward_hook(lambda m, x, y, kind=kind: self._see(kind, x[0], y)))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _see(self, kind: str, x: torch.Tensor, y: torch.Tensor) -> None:
        if kind in ("k_proj", "v_proj"):
            size = self.model.model.layers[0].self_attn.head_dim
            self._add("keys" if kind == "k_proj" else "values", y.detach().unflatten(-1, (-1, size)))
        elif kind in ("down_proj", "gate_proj"):
            self._add("inner" if kind == "down_proj" else "norms", x.detach())

    def _add(self, kind: str, x: torch.Tensor) -> None:
        x = x.double()
        peak = x.abs().amax(-1) / x.square().mean(-1).sqrt()
        centred = x - x.mean(-1, keepdim=True)
        kurtosis = centred.pow(4).mean(-1) / centred.square().mean(-1).square()
        self.seen.setdefault(kind, []).append((peak.mean().item(), kurtosis.mean().item()))

    def summary(self) -> dict[str, dict[str, float]]:
        """By kind: max|x| over the root mean square of a token's (and head's) channels, and their kurtosis; means."""
        return {
            kind: {name: sum(pair[i] for pair in pairs) / len(pairs) for i, name in enumerate(("peak", "kurtosis"))}
            for kind, pairs in self.seen.items()
        }
