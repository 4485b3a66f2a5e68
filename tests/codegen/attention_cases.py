"""Attention regions for the template's tests: shapes, masks and layouts as models write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fuseline.compiler.ops import attention
from tests.codegen.regions import region


@dataclass(frozen=True)
class Attend:
    """One attention: sizes, and how the mask is given. `layout` "bshd": tensors are transposed views, as after a
    projection; "cache": keys and values fill a longer buffer."""

    name: str
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    keys: int = 37
    head: int = 64
    head_v: int = 64
    mask: str | None = None
    kind: str = "full"
    offset: int = 0
    window: int = 0
    softcap: float = 0.0
    layout: str = "bhsd"

    def __str__(self) -> str:
        return self.name

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head)

    def function(self) -> Callable[..., Any]:
        rest = (self.scale, self.kind, self.offset, self.window, self.softcap)
        if self.mask is None:
            return lambda q, k, v: attention(q, k, v, None, *rest)
        return lambda q, k, v, mask: attention(q, k, v, mask, *rest)

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
        def filled(heads: int, length: int, width: int) -> torch.Tensor:
            if self.layout == "bshd":
                return torch.randn(self.batch, length, heads, width, device=device, dtype=dtype).transpose(1, 2)
            return torch.randn(self.batch, heads, length, width, device=device, dtype=dtype)

        q = filled(self.heads, self.queries, self.head) * 2
        k, v = filled(self.kv_heads, self.keys, self.head), filled(self.kv_heads, self.keys, self.head_v)
        return [q, k, v, *([] if self.mask is None else [MASKS[self.mask](self, dtype).to(device)])]

    def graph(self, dtype: torch.dtype, dynamic: dict[int, Any] | None = None) -> torch.fx.GraphModule:
        return region(self.function(), self.inputs(dtype), dynamic)

    def exact(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        """The op's formula in float64, written out."""
        q, k, v, *mask = (t.double() if t.is_floating_point() else t for t in inputs)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        logits = q @ k.transpose(-1, -2) * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        i = torch.arange(self.queries, device=q.device)[:, None] + self.offset
        j = torch.arange(self.keys, device=q.device)[None, :]
        if self.kind != "full":
            logits = logits.masked_fill(j > i, -math.inf)
        if self.kind == "sliding":
            logits = logits.masked_fill(j <= i - self.window, -math.inf)
        if mask:
            logits = logits.masked_fill(~mask[0], -math.inf) if mask[0].dtype == torch.bool else logits + mask[0]
        return torch.softmax(logits, -1).nan_to_num(0) @ v


def _visible(case: Attend) -> torch.Tensor:
    visible = torch.rand(case.batch, 1, case.queries, case.keys) < 0.6
    visible[..., 0] = True
    return visible


def _prefix(case: Attend) -> torch.Tensor:
    """What a static cache shows: the first third, and no key at all for the last query of the last sequence."""
    visible = (torch.arange(case.keys) <= case.keys // 3).expand(case.batch, 1, case.queries, case.keys).clone()
    if case.batch * case.queries > 1:
        visible[-1, :, -1] = False
    return visible


MASKS: dict[str, Callable[[Attend, torch.dtype], torch.Tensor]] = {
    "bool": lambda case, dtype: _visible(case),
    "prefix": lambda case, dtype: _prefix(case),
    "per head": lambda case, dtype: torch.rand(case.batch, case.heads, case.queries, case.keys) < 0.9,
    "additive": lambda case, dtype: torch.randn(case.batch, 1, case.queries, case.keys).to(dtype),
    "lowest": lambda case, dtype: torch.where(_prefix(case), 0.0, torch.finfo(dtype).min).to(dtype),
    "infinite": lambda case, dtype: torch.where(_visible(case), 0.0, -math.inf).to(dtype),
    "two dimensions": lambda case, dtype: torch.rand(case.queries, case.keys) < 0.9,
}

CASES = [
    Attend("one query"),
    Attend("cache", mask="prefix", keys=200, kv_heads=1),
    Attend("batch", batch=3, mask="prefix", queries=2, keys=130, layout="bshd"),
    Attend("bool", mask="bool", batch=2, heads=6),
    Attend("per head", mask="per head", queries=3),
    Attend("additive", mask="additive", queries=2),
    Attend("lowest", mask="lowest", batch=2, keys=70),
    Attend("infinite", mask="infinite"),
    Attend("two dimensions", mask="two dimensions", batch=2, queries=5),
    Attend("causal", kind="causal", offset=30, queries=7),
    Attend("causal from zero", kind="causal", queries=16, keys=16),
    Attend("sliding", kind="sliding", offset=90, window=20, queries=4, keys=100, mask="bool"),
    Attend("softcap", softcap=20.0, mask="prefix"),
    Attend("odd head", head=80, head_v=48),
    Attend("small head", head=8, head_v=8, heads=8, kv_heads=8),
    Attend("group of nine", heads=9, kv_heads=1, queries=4),
    Attend("many keys", keys=5000, heads=2, kv_heads=1, batch=2, mask="prefix"),
]
