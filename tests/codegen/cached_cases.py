"""Caches of codes for the templates' tests: schemes, sizes, and how full they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fuseline.compiler.cached import CacheScheme, Side
from fuseline.compiler.ops import cache_attention, cache_write
from tests.codegen.regions import region


@dataclass(frozen=True)
class Cached:
    """One attention over a cache. length: tokens in it, the queries' own included."""

    name: str
    keys: str = "int4:channel"
    values: str = "int4:token"
    batch: int = 1
    heads: int = 4
    kv_heads: int = 2
    queries: int = 1
    length: int = 201
    capacity: int = 256
    head: int = 64
    head_v: int = 64
    block: int = 64
    window: int = 16
    centred: bool = False
    mask: str | None = None
    kind: str = "full"
    sliding: int = 0
    softcap: float = 0.0

    def __str__(self) -> str:
        return self.name

    def side(self, values: bool, dtype: torch.dtype, device: str, x: torch.Tensor | None = None) -> Side:
        """An empty side, or one that holds x [batch, heads, length, head]."""
        scheme = CacheScheme.parse(self.values if values else self.keys)
        head = self.head_v if values else self.head
        assert scheme.refuse(head, self.block, values) is None
        parts = scheme.shapes(self.kv_heads, self.capacity, head, self.block, values)
        zeros = lambda *shape, dtype=dtype: torch.zeros(self.batch, *shape, dtype=dtype, device=device)
        codes = zeros(*parts["codes"], dtype=torch.uint8)
        scale, low = zeros(*parts["scale"]), zeros(*parts["low"]) if scheme.low else None
        mean = zeros(1, self.capacity, head) if self.centred else None
        recent = zeros(self.kv_heads, self.window + self.block, head)
        side = Side(codes, scale, low, mean, recent, scheme, self.block, values)
        if x is not None:
            side.write(x, torch.zeros(1, dtype=torch.int64, device=device))
        return side

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
        """q, the parts of keys and of values, the length, and the mask where there is one."""
        kept = min(self.length, self.capacity)
        x = lambda heads, length, width: torch.randn(self.batch, heads, length, width, device=device).to(dtype)
        q = x(self.heads, self.queries, self.head)
        channels = 1 + torch.rand(self.head, device=device)
        k = (x(self.kv_heads, kept, self.head) * channels + channels - 1).to(dtype)
        v = x(self.kv_heads, kept, self.head_v)
        k[..., 3], v[:, :, 5:6] = 0.5, 0.25  # a channel and a token of equal numbers: ranges of zero
        parts = [p for values, x in ((False, k), (True, v)) for p in _parts(self.side(values, dtype, device, x))]
        length = torch.tensor([self.length], device=device)
        return [q, *parts, length, *([] if self.mask is None else [MASKS[self.mask](self, dtype).to(device)])]

    def function(self) -> Callable[..., Any]:
        """The op, of the tensors that `inputs` gives."""
        absent = [p is None for v in (False, True) for p in _parts(self.side(v, torch.float32, "cpu"))]
        rest = (1 / math.sqrt(self.head), self.kind, self.keys, self.values, self.block)
        rest += (self.length - self.queries, self.sliding, self.softcap)

        def attend(q: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
            tensors = iter(given)
            parts = [None if missing else next(tensors) for missing in absent]
            return cache_attention(q, *parts, next(tensors), next(tensors, None), *rest)

        return attend

    def call(self, run: Callable[..., Any], inputs: list[Any]) -> Any:
        return run(*(i for i in inputs if i is not None))

    def graph(self, dtype: torch.dtype) -> torch.fx.GraphModule:
        return region(self.function(), [i for i in self.inputs(dtype) if i is not None])

    def exact(self, inputs: list[Any]) -> torch.Tensor:
        """The op's formula in float64 over what `cache_read` gives, written out."""
        q, *rest = inputs
        sides = []
        for values, parts in ((False, rest[:5]), (True, rest[5:10])):
            side = replace(self.side(values, q.dtype, str(q.device)), **dict(zip(NAMES, parts, strict=True)))
            sides.append(side.read(rest[10]).double().repeat_interleave(self.heads // self.kv_heads, 1))
        k, v = sides
        logits = q.double() @ k.transpose(-1, -2) / math.sqrt(self.head)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        i = torch.arange(self.queries, device=q.device)[:, None] + self.length - self.queries
        j = torch.arange(self.capacity, device=q.device)[None, :]
        hidden = j >= self.length
        if self.kind != "full":
            hidden = hidden | (j > i)
        if self.kind == "sliding":
            hidden = hidden | (j <= i - self.sliding)
        if self.mask:
            mask = rest[11]
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        return torch.softmax(logits.masked_fill(hidden, -math.inf), -1).nan_to_num(0) @ v


NAMES = ("codes", "scale", "low", "mean", "recent")


def _parts(side: Side) -> list[torch.Tensor | None]:
    return [getattr(side, name) for name in NAMES]


def _causal(case: Cached) -> torch.Tensor:
    """What transformers gives with a static cache; the first tokens of the last sequence are padding."""
    i = torch.arange(case.queries)[:, None] + case.length - case.queries
    seen = (torch.arange(case.capacity) <= i).expand(case.batch, 1, -1, -1).clone()
    seen[-1, ..., :7] = False
    return seen


MASKS: dict[str, Callable[[Cached, torch.dtype], torch.Tensor]] = {
    "causal": lambda case, dtype: _causal(case),
    "per head": lambda case, dtype: torch.rand(case.batch, case.heads, case.queries, case.capacity) < 0.8,
    "additive": lambda case, dtype: torch.where(_causal(case), 0.5, torch.finfo(dtype).min).to(dtype),
}

CASES = [
    Cached("kivi"),
    Cached("groups", "int4:channel:g16", "int4:token:g32", batch=2, mask="causal", queries=3),
    Cached("block", "int4:channel:g32", "int4:token:g16", block=32, window=0),
    Cached("minikv", "int2:channel:g16", "int2:token:g16", block=128, window=0, capacity=384, length=300),
    Cached("by token", "int4:token:g32", "int4:token", mask="additive", batch=2),
    Cached("small groups by token", "int4:token:g16", "int4:token:g16"),
    Cached("symmetric", "int8:token:sym", "int8:token:sym:g32", batch=2),
    Cached("int8", "int8:channel:g32", "int8:token"),
    Cached("fp8", "fp8:token:g32", "fp8:token"),
    Cached("fp8 by channel", "fp8:channel", "fp8:token:g32", window=0),
    Cached("mixed", "int2:token", "int8:token", centred=True),
    Cached("tada", "int4:token", "int4:token", centred=True, heads=4, kv_heads=4, batch=2, window=0),
    Cached("int8 keys, int2 values", "int8:channel", "int2:token:g32", mask="per head", queries=2),
    Cached("odd heads", "int4:channel", "int4:token", head=80, head_v=48, heads=6),
    Cached("small heads", "int4:channel", "int4:token:g16", head=32, head_v=32, heads=2),
    Cached("empty", length=0),
    Cached("one token", length=1),
    Cached("nothing coded", length=60),
    Cached("full", length=256, window=0),
    Cached("causal", kind="causal", queries=5),
    Cached("sliding", kind="sliding", sliding=90, queries=3),
    Cached("softcap", softcap=20.0, heads=9, kv_heads=1),
]


def writes(case: Cached, values: bool, dtype: torch.dtype) -> torch.fx.GraphModule:
    """A region that adds tokens to one side of a cache; of the sides' tensors, x and the length."""
    side = case.side(values, dtype, "cpu")
    parts = [getattr(side, name) for name in NAMES]
    scheme = case.values if values else case.keys

    def write(*given: torch.Tensor) -> None:
        tensors = iter(given)
        filled = [None if part is None else next(tensors) for part in parts]
        cache_write(*filled, next(tensors), next(tensors), scheme, case.block, values)

    x = torch.zeros(case.batch, case.kv_heads, 3, case.head, dtype=dtype)
    inputs = [*(p for p in parts if p is not None), x, torch.zeros(1, dtype=torch.int64)]
    return region(write, inputs, {len(inputs) - 2: (2,)})
