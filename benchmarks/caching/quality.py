"""A model whose attention sees what each token would find in a cache of codes, for all tokens of a text at once.

A query sees the tokens that are coded when it is decoded as their codes stand for them, and those in the ring as they
came, in bfloat16. A block's codes depend on that block alone, so all queries share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fuseline.compiler.cached import CacheScheme, Side, coded

ROWS = 512  # queries at a time
NAME = "fuseline_cached"


@dataclass(frozen=True)
class Setting:
    """Schemes of keys and of values for each layer, and how the cache holds them; no schemes: bfloat16."""

    keys: tuple[str, ...] = ()
    values: tuple[str, ...] = ()
    window: int = 32
    block: int = 64
    centred: bool = False
    dtype: torch.dtype = torch.bfloat16  # of the cache

    @staticmethod
    def same(layers: int, keys: str, values: str, **others: Any) -> Setting:
        return Setting((keys,) * layers, (values,) * layers, **others)

    def bytes_per_token(self, heads: int, head: int) -> float:
        """Of coded keys and values of all layers, in units of those in bfloat16."""
        total = 0.0
        for schemes, values in ((self.keys, False), (self.values, True)):
            for text in schemes:
                total += size(CacheScheme.parse(text), heads, head, self.block, values, self.centred)
        return total / (len(self.keys) + len(self.values)) if self.keys else 1.0

    def held(self, length: int, heads: int, head: int) -> float:
        """The same of a cache that holds `length` tokens, the ring in bfloat16 included."""
        ratio, past = self.bytes_per_token(heads, head), coded(length, self.window, self.block) if self.keys else 0
        return (past * ratio + length - past) / length


def size(scheme: CacheScheme, heads: int, head: int, block: int, values: bool, centred: bool) -> float:
    """Bytes of a token's keys, or values, in units of bfloat16's; scales and lows have two bytes."""
    shapes = scheme.shapes(heads, block, head, block, values)
    total = sum(torch.Size(shape).numel() * (1 if name == "codes" else 2) for name, shape in shapes.items())
    return (total + (2 * block * head if centred else 0)) / (2 * block * heads * head)


def rounded(x: torch.Tensor, text: str, setting: Setting, values: bool) -> torch.Tensor:
    """The whole blocks of x [B, H, L, D] as codes stand for them, in float32; what is left of x as it is."""
    scheme, x, block = CacheScheme.parse(text), x.to(setting.dtype), setting.block
    batch, heads, length, head = x.shape
    reason = scheme.refuse(head, block, values)
    if reason:
        raise ValueError(f"{text}: {reason}")
    capacity = -(-length // block) * block
    zeros = lambda *shape, dtype=x.dtype: torch.zeros(batch, *shape, dtype=dtype, device=x.device)
    parts = {
        name: zeros(*shape, dtype=torch.uint8 if name == "codes" else x.dtype)
        for name, shape in scheme.shapes(heads, capacity, head, block, values).items()
    }
    mean = zeros(1, capacity, head) if setting.centred else None
    side = Side(
        parts["codes"], parts["scale"], parts.get("low"), mean, zeros(heads, block, head), scheme, block, values
    )
    side.write(x, torch.zeros((), dtype=torch.int64, device=x.device))
    return side.read(torch.tensor(length, device=x.device), torch.float32)[:, :, :length]


@dataclass
class Attention:
    """The attention of every layer under a setting; with `tried`, also each choice's error in each place alone.

    errors: place (layers' keys, then layers' values) → bits → Σ‖o − ô‖² / Σ‖o‖² of the attention's result.
    """

    setting: Setting = field(default_factory=Setting)
    tried: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    errors: dict[int, dict[int, float]] = field(default_factory=dict)

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
    ) -> tuple[torch.Tensor, None]:
        scaling = options.get("scaling") or query.shape[-1] ** -0.5
        layer, setting = module.layer_idx, self.setting
        k, v = key.to(setting.dtype).float(), value.to(setting.dtype).float()
        codes = (k, v)
        if setting.keys:
            codes = (
                rounded(key, setting.keys[layer], setting, False),
                rounded(value, setting.values[layer], setting, True),
            )
        out = attend(query, (k, v), codes, setting, scaling)
        for bits, (of_keys, of_values) in self.tried.items():
            for place, new in (
                (0, (rounded(key, of_keys, setting, False), v)),
                (1, (k, rounded(value, of_values, setting, True))),
            ):
                gap = attend(query, (k, v), new, setting, scaling) - out
                ratio = (gap.square().sum() / out.square().sum()).item()
                costs = self.errors.setdefault(2 * layer + place, {})
                costs[bits] = costs.get(bits, 0.0) + ratio
        return out.transpose(1, 2).contiguous().to(query.dtype), None


def attend(
    query: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    codes: tuple[torch.Tensor, torch.Tensor],
    setting: Setting,
    scaling: float,
) -> torch.Tensor:
    """Causal attention, float32 [B, H, L, D], of which each query sees codes up to where they reach at its time."""
    groups = query.shape[1] // exact[0].shape[1]
    k, v, k_hat, v_hat = (x.repeat_interleave(groups, 1) for x in (*exact, *codes))
    same = codes[0] is exact[0] and codes[1] is exact[1]
    at = torch.arange(query.shape[2], device=query.device)
    parts = []
    for rows in at.split(ROWS):
        q = query[:, :, rows].float() * scaling
        seen = at[: rows[-1] + 1] <= rows[:, None]
        k_now, v_now = k[:, :, : rows[-1] + 1], v[:, :, : rows[-1] + 1]
        logits = q @ k_now.transpose(-1, -2)
        if same:
            parts.append(logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v_now)
            continue
        past = at[: rows[-1] + 1] < coded(rows + 1, setting.window, setting.block)[:, None]
        logits = torch.where(past, q @ k_hat[:, :, : rows[-1] + 1].transpose(-1, -2), logits)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        parts.append((weights * past) @ v_hat[:, :, : rows[-1] + 1] + (weights * ~past) @ v_now)
    return torch.cat(parts, 2)


@contextmanager
def seeing(model: Any, attention: Attention) -> Iterator[None]:
    """The model's attention is `attention` inside the block."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def heads_of(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys, and channels of a head."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, config.num_key_value_heads, head
